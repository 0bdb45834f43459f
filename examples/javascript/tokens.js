// Prints the tokens of images as JSON, without Python: after `npm install`,
// `node tokens.js BUNDLE IMAGES.npy`.
//
// IMAGES.npy holds uint8 images (N, H, W) or (N, C, H, W). The bundle's manifest says what the graph
// is called, takes and gives; its bytes are held to the manifest's sha256 before onnxruntime sees
// them. onnxruntime-web runs in node as it does in a browser, where fetch() takes the place of
// readFile().

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-web";

const BATCH = 64; // images per call

function readNpy(content) {
  if (content.subarray(0, 6).toString("latin1") !== "\x93NUMPY") throw new Error("not an .npy file");
  const start = content[6] === 1 ? 10 : 12;
  const size = content[6] === 1 ? content.readUInt16LE(8) : content.readUInt32LE(8);
  const header = content.subarray(start, start + size).toString("latin1");
  if (!header.includes("'|u1'") || !header.includes("'fortran_order': False")) throw new Error("not uint8 in C order");
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((part) => part.trim()).map(Number);
  return { shape, data: content.subarray(start + size) };
}

async function openGraph(bundle, manifest, graph) {
  const content = await readFile(join(bundle, graph.file));
  const digest = createHash("sha256").update(content).digest("hex");
  if (digest !== manifest.files[graph.file].sha256) throw new Error(`${graph.file}: damaged`);
  return ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
}

async function main([bundle, imagesFile]) {
  const manifest = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
  const graph = manifest.graphs.tokenizer;
  const [input, output] = [graph.inputs[0], graph.outputs[0]];
  const images = readNpy(await readFile(imagesFile));
  const inner = input.shape.slice(1); // the first axis is the batch
  const pixels = inner.reduce((a, b) => a * b, 1);
  const count = images.shape[0];
  const shape = images.shape.length === 3 ? [1, ...images.shape.slice(1)] : images.shape.slice(1);
  if (String(shape) !== String(inner)) throw new Error(`images are ${images.shape}, expected N,${inner}`);

  ort.env.wasm.numThreads = 1;
  const session = await openGraph(bundle, manifest, graph);
  const tokens = [];
  for (let first = 0; first < count; first += BATCH) {
    const n = Math.min(BATCH, count - first);
    const part = images.data.subarray(first * pixels, (first + n) * pixels);
    const levels = Float32Array.from(part, (level) => level / 255);
    const found = await session.run({ [input.name]: new ort.Tensor("float32", levels, [n, ...inner]) });
    const indices = Array.from(found[output.name].data, Number); // int64 arrives as BigInt
    const each = indices.length / n;
    for (let i = 0; i < n; i++) tokens.push(indices.slice(i * each, (i + 1) * each));
  }
  console.log(JSON.stringify(tokens));
}

await main(process.argv.slice(2));
