// Runs the graphs of a bundle in onnxruntime-web, in a browser or in node. The bundle's manifest
// lists their inputs and outputs. Arrays are flat: one image's values after another's.

const BATCH = 64; // images per call, unless the graphs take only one batch size
const TYPES = { float32: [Float32Array, Number], int32: [Int32Array, Number], int64: [BigInt64Array, BigInt] };

export const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

// Returns a function that runs a graph. It takes arrays by input name and the number of images, and
// returns arrays by output name. `content`: the bytes of the graph's file, whose sha256 is checked
// before onnxruntime sees them. Browsers compute no sha256 for a page that came by plain http.
export async function opened(ort, manifest, stage, content) {
  const { file, inputs, outputs } = manifest.graphs[stage];
  const found = await digest(content);
  if (found !== null && found !== manifest.files[file].sha256) throw new Error(`${file}: damaged`);
  const session = await ort.InferenceSession.create(new Uint8Array(content), { executionProviders: ["wasm"] });

  return async (arrays, count) => {
    const batch = manifest.batch ?? count; // images after `count` stay 0
    const feeds = {};
    for (const { name, dtype, shape } of inputs) {
      const [type, as] = TYPES[dtype];
      const sizes = shape.map((size) => (size === "N" ? batch : size));
      const values = new type(product(sizes));
      for (let i = 0; i < arrays[name].length; i++) values[i] = as(arrays[name][i]);
      feeds[name] = new ort.Tensor(dtype, values, sizes);
    }
    const results = await session.run(feeds);
    const numbers = (data) => (data instanceof BigInt64Array ? Array.from(data, Number) : data);
    return Object.fromEntries(
      outputs.map(({ name }) => {
        const { data } = results[name];
        return [name, numbers(data).slice(0, (data.length / batch) * count)];
      }),
    );
  };
}

// Runs a graph with one input on any number of images. rows: an array per image. Returns an array
// per image, by output name.
export async function each(run, manifest, stage, rows) {
  const { inputs, outputs } = manifest.graphs[stage];
  const size = product(inputs[0].shape.slice(1)); // the first axis is the batch
  const results = Object.fromEntries(outputs.map(({ name }) => [name, []]));
  const step = manifest.batch ?? BATCH;
  for (let first = 0; first < rows.length; first += step) {
    const part = rows.slice(first, first + step);
    const flat = new Float64Array(part.length * size);
    part.forEach((row, i) => flat.set(row, i * size));
    const found = await run({ [inputs[0].name]: flat }, part.length);
    for (const [name, data] of Object.entries(found)) results[name].push(...split(data, part.length));
  }
  return results;
}

// Splits a flat array into `count` equal parts.
export function split(data, count) {
  const size = data.length / count;
  return Array.from({ length: count }, (_, i) => data.slice(i * size, (i + 1) * size));
}

async function digest(content) {
  if (!globalThis.crypto?.subtle) return null;
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
