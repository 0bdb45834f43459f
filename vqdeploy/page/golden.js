// Compares the graphs' answers in this browser with the oracle's, on the golden batch. The package
// decided which answers are right when it wrote the page: how far the values of each image may be
// off, and which codes rounding may choose for each token at a near tie.

import { each } from "./graphs.js";

// Yields a row of the report per check. run: takes a stage and returns a function that runs its
// graph. arrays: takes a name and returns { shape, data } of that array of the page. walked: takes
// tokens and golden log p, and returns the log p that the prior's steps give.
export async function* verify(manifest, checks, run, arrays, walked) {
  const codebook = await arrays("codebook");
  const golden = {};
  for (const name of ["images", "latents", "indices", "outputs", "reconstructions"]) golden[name] = await arrays(name);
  golden.quantized = rowsOf(codebook, golden.indices.data, golden.indices.shape);
  golden.codebook = codebook;
  let [last, answers] = [null, null];
  for (const check of checks) {
    if (check.graph === "prior_step") {
      golden.log_probabilities = await arrays("log_probabilities");
      answers = { log_probabilities: await walked((await arrays("prior_indices")).data, golden.log_probabilities) };
    } else if (check.graph !== last) {
      const { shape, data } = golden[check.input];
      const size = data.length / shape[0];
      const rows = Array.from({ length: shape[0] }, (_, i) => data.slice(i * size, (i + 1) * size));
      const found = await each(await run(check.graph), manifest, check.graph, rows);
      answers = Object.fromEntries(Object.entries(found).map(([name, parts]) => [name, joined(parts)]));
    }
    last = check.graph;
    yield { name: check.name, ...JUDGES[check.rule](check, answers, golden) };
  }
}

const JUDGES = { values: judgeValues, tokens: judgeTokens, copies: judgeCopies };

// Compares each error with the scale of its image.
function judgeValues({ output, scale, tolerance }, answers, golden) {
  const [found, expected] = [answers[output], golden[output].data];
  const size = expected.length / scale.length;
  let [largest, squares, wrong] = [0, 0, 0];
  for (let i = 0; i < expected.length; i++) {
    const error = Math.abs(found[i] - expected[i]) / scale[Math.floor(i / size)];
    if (!(error <= tolerance)) wrong++; // NaN is wrong too
    largest = error > largest || Number.isNaN(error) ? error : largest;
    squares += error * error;
  }
  const compared = expected.length;
  return { compared, largest, rms: Math.sqrt(squares / compared), tolerance, wrong };
}

// A token must be the oracle's, or one of the codes that rounding may choose instead.
function judgeTokens({ expected, ties }, answers) {
  const found = answers.indices;
  let [flips, wrong] = [0, 0];
  expected.forEach((code, i) => {
    if (found[i] === code) return;
    if (ties[i]?.includes(found[i])) flips++;
    else wrong++;
  });
  const near = Object.keys(ties).length;
  return { compared: expected.length, certified: expected.length - near, ties: near, flips, wrong };
}

// The copies must be the rows of the codebook that the answer's own tokens name, bit for bit.
function judgeCopies(_, { indices, quantized }, { codebook }) {
  const copied = rowsOf(codebook, indices, [1, indices.length]).data;
  const wrong = copied.reduce((count, value, i) => count + (value !== quantized[i]), 0);
  return { compared: copied.length, wrong };
}

function rowsOf({ shape: [, size], data }, indices, [count]) {
  const rows = new Float32Array(indices.length * size);
  Array.from(indices).forEach((code, i) => rows.set(data.subarray(code * size, (code + 1) * size), i * size));
  return { shape: [count], data: rows };
}

function joined(parts) {
  const all = new Float64Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.forEach((part, i) => all.set(part, i * part.length));
  return all;
}
