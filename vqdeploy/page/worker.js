// Computes everything, outside the page's thread. Requests run one by one; each answer has the
// number of its request.

import { opened, product, each } from "./graphs.js";
import { verify } from "./golden.js";
import { readNpy } from "./npy.js";
import { prepare } from "./pictures.js";
import { draw } from "./prior.js";
import * as ort from "./runtime/ort.js";

const SHOWN_NEAR = 8;

ort.env.wasm.numThreads = 1; // more threads need headers that not every web server sends
ort.env.wasm.wasmPaths = { wasm: new URL("./runtime/ort.wasm", import.meta.url).href };

const fetched = async (path) => {
  const answer = await fetch(new URL(path, import.meta.url));
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer.arrayBuffer();
};
const fetchedJson = async (path) => JSON.parse(new TextDecoder().decode(await fetched(path)));

// Returns a function that computes the value of each argument only once.
function once(make) {
  const made = new Map();
  return (name) => {
    if (!made.has(name)) made.set(name, make(name));
    return made.get(name);
  };
}

const manifest = once(() => fetchedJson("model/manifest.json"));
const facts = once(() => fetchedJson("data/page.json"));
const array = once(async (name) => readNpy(await fetched(`data/${name}.npy`)));
const graph = once(async (stage) => {
  const said = await manifest();
  return opened(ort, said, stage, await fetched(`model/${said.graphs[stage].file}`));
});

// Runs a graph on rows, and returns the rows of its first output.
async function run(stage, rows) {
  const said = await manifest();
  const found = await each(await graph(stage), said, stage, rows);
  return found[said.graphs[stage].outputs[0].name];
}

const requests = {
  async start() {
    await Promise.all([graph("tokenizer"), array("start")]);
    return { manifest: await manifest(), facts: await facts(), start: (await array("start")).data };
  },

  // Returns a file's image [C, H, W], 8 bits, and whether this browser read it as Pillow does.
  async prepare(file) {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    const { width, height } = bitmap;
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const { data } = context.getImageData(0, 0, width, height);
    const { preprocessing, spec } = await manifest();
    const image = prepare({ width, height, channels: 4, data }, 1, preprocessing, spec.image_shape);
    return { image, width, height, exact: await isExact(file, data) };
  },

  // Returns the tokens of an image of 8 bits.
  async encode(image) {
    return Array.from((await run("tokenizer", [Float64Array.from(image, (level) => level / 255)]))[0]);
  },

  decode: (rows) => run("detokenizer", rows),

  // Returns the vector of a code, and the codes nearest to it.
  async code(code) {
    const { shape: [count, size], data } = await array("codebook");
    const row = (k) => data.subarray(k * size, (k + 1) * size);
    const own = row(code);
    const distance = (k) => Math.sqrt(row(k).reduce((sum, x, i) => sum + (x - own[i]) ** 2, 0));
    const near = Array.from({ length: count }, (_, k) => ({ code: k, distance: distance(k) }));
    near.sort((a, b) => a.distance - b.distance || a.code - b.code);
    return { vector: own.slice(), near: near.filter(({ code: k }) => k !== code).slice(0, SHOWN_NEAR) };
  },

  async sample({ seed, count, temperature }) {
    const said = await manifest();
    const step = said.prior ? await graph("prior_step") : null;
    const { log_probabilities: tolerance } = await facts();
    const numbers = Array.from({ length: count }, (_, i) => i);
    const drawn = [];
    const size = said.batch ?? count;
    for (let first = 0; first < count; first += size) {
      const part = numbers.slice(first, first + size);
      drawn.push(...(await draw(step, sizes(said), seed, part, temperature, tolerance)));
    }
    return { drawn, images: await run("detokenizer", drawn.map(([tokens]) => tokens)) };
  },

  async verify(_, tell) {
    const said = await manifest();
    const walked = async (indices, golden) => walk(await graph("prior_step"), sizes(said), said.batch, indices, golden);
    for await (const row of verify(said, await fetchedJson("data/checks.json"), graph, array, walked)) tell(row);
    return { digests: Boolean(globalThis.crypto?.subtle) };
  },

  async bytes() {
    return performance.getEntriesByType("resource").reduce((sum, entry) => sum + entry.encodedBodySize, 0);
  },
};

// Returns the sizes that draw() needs.
function sizes({ spec, prior, graphs }) {
  const keys = graphs.prior_step?.inputs.find(({ name }) => name === "keys");
  return {
    positions: product(spec.latent_shape),
    codes: spec.num_codes,
    kept: prior ? product(keys.shape.slice(1)) : 0,
  };
}

// Returns log p (n, P, K), flat, of the first P positions of rows of tokens (n, S). `batch`: the
// only number of rows that the graph takes, if it does not take any.
async function walk(step, { positions, codes, kept }, batch, indices, { shape: [count, walked] }) {
  const found = new Float32Array(count * walked * codes);
  for (let first = 0; first < count; first += batch ?? count) {
    const rows = Math.min(batch ?? count, count - first);
    let keys = new Float32Array(rows * kept);
    let values = keys;
    for (let s = 0; s < walked; s++) {
      const previous = Array.from({ length: rows }, (_, i) => (s ? indices[(first + i) * positions + s - 1] : 0));
      const answer = await step({ previous, position: [s], keys, values }, rows);
      [keys, values] = [answer.next_keys, answer.next_values];
      for (let i = 0; i < rows; i++)
        found.set(answer.log_probabilities.slice(i * codes, (i + 1) * codes), ((first + i) * walked + s) * codes);
    }
  }
  return found;
}

// Every browser reads opaque pictures of lossless formats with at most 8 bits alike.
async function isExact(file, data) {
  const head = new Uint8Array(await file.slice(0, 26).arrayBuffer());
  const begins = (text) => String.fromCharCode(...head.subarray(0, text.length)) === text;
  const lossless = (begins("\x89PNG") && head[24] <= 8) || begins("GIF8") || begins("BM");
  return lossless && data.every((level, i) => i % 4 !== 3 || level === 255);
}

let last = Promise.resolve();
onmessage = ({ data: { id, name, argument } }) => {
  last = last.then(async () => {
    try {
      postMessage({ id, result: await requests[name](argument, (row) => postMessage({ id, row })) });
    } catch (error) {
      postMessage({ id, error: String(error.message ?? error).split("\n")[0] });
    }
  });
};
