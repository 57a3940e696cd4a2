// Runs the cases that a client's program gets on standard input, and prints what came of each as JSON: the twin of common.py.

import { text } from "node:stream/consumers";

// Run all cases one after the other. `calls(url, model)` returns the functions by name.
export async function run(calls) {
  const job = JSON.parse(await text(process.stdin));
  const functions = calls(job.url, job.model, job);
  const results = {};
  for (const { name, call, arguments: given } of job.cases) {
    try {
      results[name] = await functions[call](given);
    } catch (error) {
      results[name] = { error: describe(error) };
    }
  }
  process.stdout.write(JSON.stringify(results) + "\n", () => process.exit(0));
}

// The classes of an exception, and the attributes that clients give to errors of a server.
export function describe(error) {
  const classes = [];
  for (let at = Object.getPrototypeOf(error); at && at !== Object.prototype; at = Object.getPrototypeOf(at)) {
    classes.push(at.constructor.name);
  }
  const { name, code = null, param = null, message } = error;
  return { classes, name, status_code: error.statusCode ?? error.status ?? null, code, param, message };
}

// Make a call that must fail. Returns the exception, and how many requests the server ended because of it.
export async function givenUp(url, call) {
  const wait = await ended(url);
  try {
    return { answer: await call() };
  } catch (error) {
    return { error: describe(error), ended: await wait() };
  }
}

// Returns a function that waits until the server has ended a request early, because its client left or its time was over. It
// returns how many have ended so since.
export async function ended(url) {
  const before = await total(url);
  return async (seconds = 20) => {
    const until = Date.now() + seconds * 1000;
    let now = await total(url);
    while (now === before && Date.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      now = await total(url);
    }
    return now - before;
  };
}

async function total(url) {
  const lines = (await (await fetch(`${url}/metrics`)).text()).split("\n");
  const found = lines.filter((line) => /^tidegate_requests_(aborted|failed)_total{/.test(line));
  return found.reduce((sum, line) => sum + Number(line.split(" ").pop()), 0);
}
