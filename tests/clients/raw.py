"""Makes the calls of tests/clients/cases.py over plain HTTP, and brings the answers to the shape that clients' programs give."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.clients.cases import Case
from tests.support import plain_http

ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "responses": "/v1/responses"}


class Raw:
    """Sends bodies to the server at `url`, and keeps the answers."""

    def __init__(self, url: str, model: str) -> None:
        self._http = plain_http.Client(base_url=url, timeout=120, trust_env=False)
        self._model = model
        self._answers: dict[str, str] = {}

    def close(self) -> None:
        self._http.close()

    def answer(self, case: Case) -> Any:
        """Return the right answer of a call: what the server sends, whole, to one request at a time."""
        key = json.dumps(case)
        if key not in self._answers:
            self._answers[key] = json.dumps(self._answer(case))
        return json.loads(self._answers[key])

    def _answer(self, case: Case) -> Any:
        arguments = dict(case.arguments)
        match case.call:
            case "history" | "history_dumped":
                first, then = arguments.pop("messages"), arguments.pop("then")
                said = self._whole("chat", {**arguments, "messages": first})["choices"][0]["text"]
                messages = [*first, {"role": "assistant", "content": said}, *then]
                return self._whole("chat", {**arguments, "messages": messages})
            case "concurrent":
                return [self._whole("chat", {**arguments, "seed": seed}) for seed in arguments.pop("seeds")]
            case "models":
                listed = [card["id"] for card in self._http.get("/v1/models").json()["data"]]
                return [*listed, self._http.get(f"/v1/models/{self._model}").json()["id"]]
            case "request_id":
                header = {"x-request-id": arguments.pop("id")}
                return self._post("chat", arguments, header).headers["x-request-id"]
            case call:
                return self._whole(call.removesuffix("_stream"), arguments)

    def refusal(self, case: Case) -> tuple[int, dict[str, Any]]:
        """Return status and error object of the server's answer to a call that it refuses."""
        arguments = dict(case.arguments)
        if case.call == "unknown_model":
            arguments["model"] = "nobody/nothing"
        answer = self._post("responses" if case.call == "responses" else "chat", arguments)
        return answer.status_code, answer.json()["error"]

    def _post(self, call: str, arguments: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        extra = arguments.pop("extra_body", {})
        return self._http.post(ROUTES[call], json={"model": self._model, **arguments, **extra}, headers=headers)

    def _whole(self, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        answer = self._post(call, dict(arguments))
        assert answer.status_code == 200, answer.text
        body = answer.json()
        choices = [
            {"text": _text(choice), "finish_reason": choice["finish_reason"], "logprobs": _logprobs(choice["logprobs"])}
            for choice in body["choices"]
        ]
        usage = {name: body["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        return {"choices": choices, "usage": usage}


def _text(choice: dict[str, Any]) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"]


def _logprobs(given: dict[str, Any] | None) -> list[Any] | None:
    if given is None:
        return None
    if "content" in given:
        return [
            [at["token"], at["logprob"], [[top["token"], top["logprob"]] for top in at["top_logprobs"]]]
            for at in given["content"]
        ]
    tops = given["top_logprobs"] or [None] * len(given["tokens"])
    return [list(at) for at in zip(given["tokens"], given["token_logprobs"], tops, strict=True)]
