// Draws the tokens of samples from a bundle with a learned prior, without Python: after
// `npm install`, `node samples.js BUNDLE COUNT [--seed N] [--temperature X]`.
//
// Prints them as JSON, a row per sample. What is certified in the bundle's program is certified here:
// the same tokens on every machine. prior.js has the noise and the choice.

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-web";
import { opened, product } from "../../vqdeploy/page/graphs.js";
import { draw } from "../../vqdeploy/page/prior.js";

const BATCH = 64; // samples side by side, unless the graph takes one number alone

async function main() {
  const options = { seed: { type: "string", default: "0" }, temperature: { type: "string", default: "1" } };
  const { positionals, values } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 2) throw new Error("usage: node samples.js BUNDLE COUNT [--seed N]");
  const [bundle, count] = [positionals[0], Number(positionals[1])];
  const manifest = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
  if (!manifest.prior) throw new Error(`${bundle}: it has no learned prior`);
  ort.env.wasm.numThreads = 1;
  const { file, inputs } = manifest.graphs.prior_step;
  const step = await opened(ort, manifest, "prior_step", await readFile(join(bundle, file)));
  const { latent_size: positions, num_codes: codes } = manifest.prior.spec;
  const kept = product(inputs.find(({ name }) => name === "keys").shape.slice(1));
  const [seed, temperature] = [BigInt(values.seed), Number(values.temperature)];
  const size = manifest.batch ?? BATCH;
  const tokens = [];
  for (let first = 0; first < count; first += size) {
    const numbers = Array.from({ length: Math.min(size, count - first) }, (_, i) => first + i);
    const drawn = await draw(step, { positions, codes, kept }, seed, numbers, temperature);
    tokens.push(...drawn.map(([row]) => row));
  }
  console.log(JSON.stringify(tokens));
}

await main().catch((error) => {
  console.error(error.message.split("\n")[0]);
  process.exitCode = 1;
});
