"""Measures the CPU time that an API worker spends on a streamed token. The engine runs FakeRunner, which computes nothing.

    python -m loadtest.bench_api [--streams 256] [--tokens 400] [--rounds 3] [--route generate|completions|chat]

The script starts a real server (`tidegate serve --runner fake`). A second process opens all streams at once and reads raw
sockets, parsing no more than it must. The figure is the CPU time of the worker process, user and system, from before the
first request to after the last token, divided by the number of tokens in the answers' usage. It includes the cost of the
requests themselves. The script prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import selectors
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

START_SECONDS = 60.0
WORKER_TITLE = "tidegate: api 0"
ROUTES: dict[str, tuple[str, dict[str, object]]] = {
    "generate": ("/v1/generate", {"prompt": "The tide comes in and"}),
    "completions": ("/v1/completions", {"prompt": "The tide comes in and", "stream_options": {"include_usage": True}}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "The tide?"}], "stream_options": {"include_usage": True}},
    ),
}
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU cost of a streamed token in an API worker.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=25.0, help="milliseconds of a step of the simulated device")
    parser.add_argument("--route", choices=sorted(ROUTES), default="generate")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        print(json.dumps(_stream_all(args.client, args.route, args.streams, args.tokens)))
        return
    began = time.perf_counter()
    with _server(args) as (port, startup_s):
        _client(port, args, tokens=32)  # warm-up: the first requests are slower, since they load modules and tables
        rounds = [_round(port, args) for _ in range(args.rounds)]
    _report(args, rounds, startup_s, time.perf_counter() - began)


def _report(args: argparse.Namespace, rounds: list[dict[str, float]], startup_s: float, seconds: float) -> None:
    print(f"/v1/{args.route}: {args.streams} streams of {args.tokens} tokens, a step every {args.step_ms:g} ms")
    names = ("tokens", "tok/s", "CPU s", "us/token", "us/event", "busy", "first byte p99 ms")
    print("round".ljust(6) + "".join(name.rjust(len(name) + 4) for name in names))
    for i, r in enumerate(rounds):
        per_event = r["cpu_s"] / r["events"] * 1e6
        values = [f"{r['tokens']:.0f}", f"{r['tokens'] / r['seconds']:.0f}", f"{r['cpu_s']:.2f}", f"{r['cpu_us']:.1f}"]
        values += [f"{per_event:.1f}", f"{r['cpu_s'] / r['seconds']:.0%}", f"{r['first_byte_p99_ms']:.0f}"]
        print(str(i).ljust(6) + "".join(v.rjust(len(n) + 4) for n, v in zip(names, values, strict=True)))
    middle = sorted(rounds, key=lambda r: r["cpu_us"])[len(rounds) // 2]
    line = {
        "device": f"{platform.machine()}, {psutil.cpu_count()} CPUs",
        "engine": "fake",
        "model": "demo",
        "precision": None,
        "workload": f"{args.route} {args.streams}x{args.tokens}",
        "seconds": round(seconds, 1),
        "out_tok_s": round(middle["tokens"] / middle["seconds"]),
        "startup_s": round(startup_s, 2),
        "events_per_token": round(middle["events"] / middle["tokens"], 3),  # if below 1, some events carried several tokens
        "cpu_us_per_token": round(statistics.median(r["cpu_us"] for r in rounds), 1),
    }
    print(json.dumps(line))


def _round(port: int, args: argparse.Namespace) -> dict[str, float]:
    worker = _worker(port)
    before = worker.cpu_times()
    result = _client(port, args, tokens=args.tokens)
    after = worker.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return {**result, "cpu_s": cpu, "cpu_us": cpu / result["tokens"] * 1e6}


def _worker(port: int) -> psutil.Process:
    """Return the process of the API worker that listens on `port`. Other servers may run on this machine too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
            if " ".join(process.cmdline()).strip() == WORKER_TITLE and port in ports:
                return process
    raise SystemExit(f"no process is titled {WORKER_TITLE!r} and listens on port {port}")


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """Run a server with the fake runner. Yields the server's port and the seconds until the server was ready."""
    port, grpc_port = _free_port(), _free_port()
    # All streams run at once, as in earlier results: an adaptive batch would begin with a few of them.
    command = [str(Path(sys.executable).with_name("tidegate")), "serve", "--runner", "fake", "--batching", "fixed"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port), "--admin-port", "0", "--log-level", "warning"]
    command += ["--fake-step-ms", str(args.step_ms), "--max-num-seqs", str(args.streams)]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise SystemExit("the server did not start")
            time.sleep(0.05)
        yield port, time.perf_counter() - began
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _client(port: int, args: argparse.Namespace, *, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "loadtest.bench_api", "--client", str(port), "--route", args.route]
    command += ["--streams", str(args.streams), "--tokens", str(tokens)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(run.stdout)
    expected = args.streams * tokens
    if result["tokens"] != expected:
        raise SystemExit(f"the streams had {result['tokens']:.0f} tokens instead of {expected}: {result}")
    return result


# -- the functions below run in the client's process -------------------------------------------------------------------


def _stream_all(port: int, route: str, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Open all streams and read each to its end. Only the last 2 KB of a stream are kept, since they hold the token counts."""
    path, fields = ROUTES[route]
    fields = {"model": _model(port), **fields, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    first_bytes: list[float] = []
    began = time.perf_counter()
    for _ in range(num_streams):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(head + body)
        selector.register(client, selectors.EVENT_READ, client)
        tails[client] = b""
    tokens = events = 0
    while selector.get_map():
        for key, _ in selector.select():
            client = key.data
            piece = client.recv(1 << 16)
            if piece:
                if not tails[client]:
                    first_bytes.append(time.perf_counter() - began)
                events += (tails[client][-5:] + piece).count(b"data: ")  # the tail completes a mark that two reads cut in half
                tails[client] = (tails[client] + piece)[-2048:]
                continue
            selector.unregister(client)
            client.close()
            found = _COMPLETION_TOKENS.search(tails[client])
            tokens += int(found.group(1)) if found and b"[DONE]" in tails[client] else 0
    seconds = time.perf_counter() - began
    p99 = statistics.quantiles(first_bytes, n=100)[-1] if len(first_bytes) > 1 else 0.0
    return {"tokens": tokens, "events": events, "seconds": seconds, "first_byte_p99_ms": p99 * 1e3}


def _model(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
        name: str = json.load(response)["data"][0]["id"]
        return name


if __name__ == "__main__":
    main()
