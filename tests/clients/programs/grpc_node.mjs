// Drives Tidegate's gRPC service, and the standard health service, with @grpc/grpc-js and the proto file.

import { createRequire } from "node:module";
import path from "node:path";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

import { ended, run } from "./common.mjs";

const OPTIONS = { keepCase: true, longs: Number, enums: String, oneofs: true, defaults: true };
const HEALTH = path.join(path.dirname(createRequire(import.meta.url).resolve("grpc-health-check/package.json")), "proto");

function load(folder, file) {
  const definition = loader.loadSync(path.join(folder, file), { ...OPTIONS, includeDirs: [folder] });
  return { definition, services: grpc.loadPackageDefinition(definition) };
}

function calls(url, model, { grpc: address, protos }) {
  const { definition, services } = load(protos, "tidegate/v1/inference.proto");
  const plain = grpc.credentials.createInsecure();
  const client = new services.tidegate.v1.Inference(address, plain);
  const health = new (load(HEALTH, "health/v1/health.proto").services.grpc.health.v1.Health)(address, plain);
  const detail = definition["tidegate.v1.ErrorDetail"];

  // The status of a failed call by name, with the ErrorDetail of its trailing metadata.
  const failure = (error) => {
    const [bytes] = error.metadata?.get("tidegate-error-bin") ?? [];
    const { type, code, param } = bytes ? detail.deserialize(bytes) : {};
    return { status: grpc.status[error.code], message: error.details, type, code, param };
  };

  const unary = (service, method) => (given) =>
    new Promise((resolve) => {
      service[method](given, (error, answer) => resolve(error ? { error: failure(error) } : answer));
    });

  // Read a call of Generate to its end. `each(response, call)` may end it earlier.
  const generate = (given, { options = {}, each = () => {} } = {}) =>
    new Promise((resolve) => {
      const call = client.Generate(given, new grpc.Metadata(), options);
      const outputs = [];
      let ids = new Set();
      let ending = null;
      let header = null;
      call.on("metadata", (metadata) => (header = metadata.get("x-request-id")[0]));
      call.on("data", (response) => {
        ids.add(response.id);
        if (response.event === "chunk") {
          const { index, text, token_ids, finish_reason, logprobs } = response.chunk;
          const at = (outputs[index] ??= { index, text: "", token_ids: [], finish_reason: null, logprobs: [] });
          at.text += text;
          at.token_ids.push(...token_ids);
          at.finish_reason = finish_reason ?? at.finish_reason;
          at.logprobs.push(...logprobs);
        } else {
          const { prompt_tokens, completion_tokens } = response.ending.usage;
          ending = { model: response.ending.model, usage: { prompt_tokens, completion_tokens } };
        }
        each(response, call);
      });
      call.on("error", (error) => resolve({ error: failure(error) }));
      call.on("end", () => ending && resolve({ outputs, ...ending, one_id: ids.size === 1 && ids.has(header) }));
    });

  return {
    generate: (given) => generate(given),
    unknown_model: (given) => generate({ ...given, model: "nobody/nothing" }),
    concurrent: ({ seeds, ...given }) => Promise.all(seeds.map((seed) => generate({ ...given, seed }))),
    tokenize: unary(client, "Tokenize"),
    detokenize: unary(client, "Detokenize"),
    models: unary(client, "ListModels"),
    health: unary(health, "Check"),
    deadline: async (given) => {
      const wait = await ended(url);
      return { ...(await generate(given, { options: { deadline: Date.now() + 1000 } })), ended: await wait() };
    },
    cancel: async (given) => {
      const wait = await ended(url);
      const answer = await generate(given, { each: (response, call) => call.cancel() });
      return { ...answer, ended: await wait() };
    },
    // End a running call from another call, by the id in its first response.
    abort: (given) => {
      let aborting = null;
      const each = ({ id }) => (aborting ??= unary(client, "Abort")({ id }));
      return generate(given, { each }).then(async (answer) => ({ ...answer, ...(await aborting) }));
    },
    abort_unknown: unary(client, "Abort"),
  };
}

await run(calls);
