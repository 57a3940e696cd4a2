// Drives Vercel's AI SDK with its provider for servers that are compatible with OpenAI's.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, streamText, tool } from "ai";

import { ended, describe, givenUp, run } from "./common.mjs";

const PROVIDER = "tidegate";
const NAMES = {
  max_tokens: "maxOutputTokens",
  temperature: "temperature",
  top_p: "topP",
  seed: "seed",
  stop: "stopSequences",
  presence_penalty: "presencePenalty",
  frequency_penalty: "frequencyPenalty",
};

const usageOf = (given) => ({ prompt_tokens: given.inputTokens, completion_tokens: given.outputTokens });

const shapeOf = (text, finishReason, usage) => ({
  choices: [{ text, finish_reason: finishReason, logprobs: null }],
  usage: usageOf(usage),
});

// Translate the arguments of a case. The SDK takes system messages apart from the others.
function settings({ messages, prompt, tools, response_format: format, extra_body: extra, ...given }) {
  const named = Object.fromEntries(Object.entries(given).map(([key, value]) => [NAMES[key], value]));
  const system = messages?.find((message) => message.role === "system")?.content;
  const others = messages?.filter((message) => message.role !== "system");
  return {
    ...named,
    ...(messages ? { instructions: system, messages: others } : { prompt }),
    ...(tools && { tools: Object.fromEntries(tools.map(({ function: f }) => [f.name, toolOf(f)])) }),
    ...(format && { output: Output.object({ schema: jsonSchema(format.json_schema.schema) }) }),
    ...(extra && { providerOptions: { [PROVIDER]: extra } }),
    maxRetries: 0,
  };
}

const toolOf = ({ description, parameters }) => tool({ description, inputSchema: jsonSchema(parameters) });

async function whole(model, given) {
  const answer = await generateText({ model, ...settings(given) });
  return shapeOf(answer.text, answer.finishReason, answer.usage);
}

// Join a stream. The SDK reports an error of the server as a part of the stream.
async function streamed(model, given) {
  const answer = streamText({ model, ...settings(given), onError: () => {} });
  let text = "";
  let pieces = 0;
  for await (const part of answer.stream) {
    if (part.type === "error") throw part.error;
    if (part.type !== "text-delta") continue;
    text += part.text;
    pieces += part.text ? 1 : 0;
  }
  return { ...shapeOf(text, await answer.finishReason, await answer.usage), pieces };
}

function calls(url, name) {
  const provider = createOpenAICompatible({
    name: PROVIDER,
    baseURL: `${url}/v1`,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const model = provider.chatModel(name);
  const writer = provider.completionModel(name);
  return {
    chat: (given) => whole(model, given),
    chat_stream: (given) => streamed(model, given),
    completion: (given) => whole(writer, given),
    completion_stream: (given) => streamed(writer, given),
    unknown_model: (given) => whole(provider.chatModel("nobody/nothing"), given),
    // Feed the answer's own messages back as history.
    history: async ({ messages, then, ...given }) => {
      const first = await generateText({ model, ...settings({ messages, ...given }) });
      return whole(model, { messages: [...messages, ...first.response.messages, ...then], ...given });
    },
    cancel: async (given) => {
      const wait = await ended(url);
      const controller = new AbortController();
      const answer = streamText({ model, ...settings(given), abortSignal: controller.signal });
      let read = 0;
      for await (const text of answer.textStream) {
        read += text ? 1 : 0;
        if (read === 3) controller.abort();
      }
      return { read, ended: await wait() };
    },
    timeout: (given) => givenUp(url, () => generateText({ model, ...settings(given), timeout: 1000 })),
    concurrent: ({ seeds, ...given }) => Promise.all(seeds.map((seed) => whole(model, { ...given, seed }))),
  };
}

await run(calls);
