// Drives the openai client for Node.

import OpenAI from "openai";

import { ended, givenUp, run } from "./common.mjs";

const usageOf = (given) => given && { prompt_tokens: given.prompt_tokens, completion_tokens: given.completion_tokens };

const chatLogprobs = (given) =>
  given?.content?.map((at) => [at.token, at.logprob, at.top_logprobs.map((top) => [top.token, top.logprob])]) ?? null;

const textLogprobs = (given) =>
  given?.tokens?.map((token, i) => [token, given.token_logprobs[i], given.top_logprobs?.[i] ?? null]) ?? null;

const wholeOf = (textOf, logprobsOf) => (answer) => ({
  choices: answer.choices.map((choice) => ({
    text: textOf(choice),
    finish_reason: choice.finish_reason,
    logprobs: logprobsOf(choice.logprobs),
  })),
  usage: usageOf(answer.usage),
});

const joined = async (stream, textOf, logprobsOf) => {
  const choices = [];
  let usage = null;
  let pieces = 0;
  for await (const chunk of stream) {
    usage = usageOf(chunk.usage) ?? usage;
    for (const choice of chunk.choices) {
      const at = (choices[choice.index] ??= { text: "", finish_reason: null, logprobs: null });
      const text = textOf(choice) ?? "";
      pieces += text ? 1 : 0;
      at.text += text;
      at.finish_reason = choice.finish_reason ?? at.finish_reason;
      const logprobs = logprobsOf(choice.logprobs);
      if (logprobs) at.logprobs = [...(at.logprobs ?? []), ...logprobs];
    }
  }
  return { choices, usage, pieces };
};

// Node's client sends fields that it does not know as they are, so extra_body is spread into the body.
const flat = ({ extra_body = {}, ...others }) => ({ ...others, ...extra_body });

function calls(url, model) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const chats = client.chat.completions;
  const streamed = { stream: true, stream_options: { include_usage: true } };
  const chatOf = wholeOf((choice) => choice.message.content, chatLogprobs);
  const textOf = wholeOf((choice) => choice.text, textLogprobs);
  const chat = async (given) => chatOf(await chats.create({ model, ...flat(given) }));

  return {
    chat,
    chat_stream: async (given) =>
      joined(await chats.create({ model, ...flat(given), ...streamed }), (choice) => choice.delta.content, chatLogprobs),
    completion: async (given) => textOf(await client.completions.create({ model, ...flat(given) })),
    completion_stream: async (given) =>
      joined(await client.completions.create({ model, ...flat(given), ...streamed }), (choice) => choice.text, textLogprobs),
    unknown_model: (given) => chat({ ...given, model: "nobody/nothing" }),
    // Feed the answer's own message object back as history.
    history: async ({ messages, then, ...given }) => {
      const { message } = (await chats.create({ model, messages, ...flat(given) })).choices[0];
      return chat({ ...given, messages: [...messages, message, ...then] });
    },
    cancel: async (given) => {
      const wait = await ended(url);
      const stream = await chats.create({ model, ...flat(given), stream: true });
      let read = 0;
      for await (const chunk of stream) {
        read += chunk.choices.length;
        if (read === 3) break; // which closes the stream
      }
      return { read, ended: await wait() };
    },
    timeout: (given) => givenUp(url, () => chats.create({ model, ...flat(given) }, { timeout: 1000 })),
    concurrent: ({ seeds, ...given }) => Promise.all(seeds.map((seed) => chat({ ...given, seed }))),
    models: async () => [...(await client.models.list()).data.map((card) => card.id), (await client.models.retrieve(model)).id],
    request_id: async ({ id, ...given }) =>
      (await chats.create({ model, ...flat(given) }, { headers: { "x-request-id": id } }))._request_id,
    responses: async (given) => (await client.responses.create({ model, ...given })).output_text,
  };
}

await run(calls);
