// The graphs of a bundle in onnxruntime-web, in a browser or in node. Whatever a graph takes and
// gives is said by the bundle's manifest. An array is flat, one image's values after another's.

const BATCH = 64; // images per call, unless the graphs take one number alone
const TYPES = { float32: [Float32Array, Number], int32: [Int32Array, Number], int64: [BigInt64Array, BigInt] };

export const product = (sizes) => sizes.reduce((a, b) => a * b, 1);

// A function that runs a graph: (arrays by the names of its inputs, the number of images) to arrays
// by the names of its outputs. `content`: the bytes of its file, held to the manifest's sha256
// before onnxruntime sees them. Browsers compute no sha256 for a page that came by plain http.
export async function opened(ort, manifest, stage, content) {
  const { file, inputs, outputs } = manifest.graphs[stage];
  const found = await digest(content);
  if (found !== null && found !== manifest.files[file].sha256) throw new Error(`${file}: damaged`);
  const session = await ort.InferenceSession.create(new Uint8Array(content), { executionProviders: ["wasm"] });

  return async (arrays, count) => {
    const batch = manifest.batch ?? count; // of which those after `count` stay 0
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

// Runs a graph of one input on any number of images. rows: an array for each. Returns, by the names
// of its outputs, an array for each.
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

// A flat array as `count` equal parts.
export function split(data, count) {
  const size = data.length / count;
  return Array.from({ length: count }, (_, i) => data.slice(i * size, (i + 1) * size));
}

async function digest(content) {
  if (!globalThis.crypto?.subtle) return null;
  const bytes = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
