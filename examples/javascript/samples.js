// Draws the tokens of samples from a bundle with a learned prior, without Python: after
// `npm install`, `node samples.js BUNDLE COUNT [--seed N] [--temperature X]`.
//
// Prints them as JSON, a row per sample. Token s is the code of the largest log p / temperature +
// noise, given the tokens before it. The noise of sample i is a function of the seed and i alone: of
// each word of Philox 4x64-10 (Salmon et al. 2011), whose key is the seed and whose counter begins at
// i * 2^192, the upper 52 bits are u = (bits + 1/2) / 2^52, and the noise is -log(-log(u)). What is
// certified in the bundle's program is certified here: the same tokens on every machine.

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-web";

const BATCH = 64; // samples side by side, unless the graph takes one number alone
const WORD = (1n << 64n) - 1n;
const FACTORS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const INDICES = { int32: (rows) => Int32Array.from(rows), int64: (rows) => BigInt64Array.from(rows, BigInt) };

async function main() {
  const options = { seed: { type: "string", default: "0" }, temperature: { type: "string", default: "1" } };
  const { positionals, values } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 2) throw new Error("usage: node samples.js BUNDLE COUNT [--seed N]");
  const [bundle, count] = [positionals[0], Number(positionals[1])];
  const manifest = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
  if (!manifest.prior) throw new Error(`${bundle}: it has no learned prior`);
  ort.env.wasm.numThreads = 1;
  const session = await opened(bundle, manifest);
  const size = manifest.batch ?? BATCH;
  const tokens = [];
  for (let first = 0; first < count; first += size) {
    const part = Array.from({ length: Math.min(size, count - first) }, (_, i) => first + i);
    tokens.push(...(await drawn(session, manifest, BigInt(values.seed), part, Number(values.temperature))));
  }
  console.log(JSON.stringify(tokens));
}

async function opened(bundle, manifest) {
  const { file } = manifest.graphs.prior_step;
  const content = await readFile(join(bundle, file));
  const digest = createHash("sha256").update(content).digest("hex");
  if (digest !== manifest.files[file].sha256) throw new Error(`${file}: damaged`);
  return ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
}

// The tokens of the samples of some numbers.
async function drawn(session, manifest, seed, numbers, temperature) {
  const { latent_size: positions, num_codes: codes } = manifest.prior.spec;
  const [previous, , keys] = manifest.graphs.prior_step.inputs;
  const count = manifest.batch ?? numbers.length;
  const shape = [count, ...keys.shape.slice(1)];
  const noises = numbers.map((number) => gumbel(seed, number, positions * codes));
  const tokens = numbers.map(() => []);
  const empty = () => new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b)), shape);
  let kept = { keys: empty(), values: empty() };
  for (let s = 0; s < positions; s++) {
    const before = Array.from({ length: count }, (_, i) => tokens[i]?.[s - 1] ?? 0);
    const found = await session.run({
      previous: new ort.Tensor(previous.dtype, INDICES[previous.dtype](before), [count]),
      position: new ort.Tensor("int64", BigInt64Array.of(BigInt(s)), [1]),
      ...kept,
    });
    kept = { keys: found.next_keys, values: found.next_values };
    const logP = found.log_probabilities.data;
    tokens.forEach((row, i) => {
      let best = 0;
      let most = -Infinity;
      for (let k = 0; k < codes; k++) {
        const score = logP[i * codes + k] / temperature + noises[i][s * codes + k];
        if (score > most) [best, most] = [k, score]; // the first of several
      }
      row.push(best);
    });
  }
  return tokens;
}

function gumbel(seed, number, count) {
  const noise = new Float64Array(count);
  for (let block = 0; 4 * block < count; block++) {
    philox([BigInt(block + 1), 0n, 0n, BigInt(number)], [seed & WORD, seed >> 64n]).forEach((word, i) => {
      if (4 * block + i < count) {
        const u = (Number(word >> 12n) + 0.5) / 2 ** 52;
        noise[4 * block + i] = -Math.log(-Math.log(u));
      }
    });
  }
  return noise;
}

// Four words of 64 bits of a counter of four and a key of two. NumPy counts from 1.
function philox([a, b, c, d], [first, second]) {
  for (let round = 0; round < 10; round++) {
    const [left, right] = [FACTORS[0] * a, FACTORS[1] * c];
    [a, b, c, d] = [(right >> 64n) ^ b ^ first, right & WORD, (left >> 64n) ^ d ^ second, left & WORD];
    first = (first + STEPS[0]) & WORD;
    second = (second + STEPS[1]) & WORD;
  }
  return [a, b, c, d];
}

await main().catch((error) => {
  console.error(error.message.split("\n")[0]);
  process.exitCode = 1;
});
