// Draws samples from a learned prior. Certified tokens of a seed are the same on every machine.
// Imports nothing, so it runs in node and in a browser.
//
// Token s is the code with the largest log p / temperature + noise, given the tokens before it. The
// noise of sample i depends only on the seed and i. It comes from Philox 4x64-10 (Salmon et al.
// 2011), whose key is the seed and whose counter starts at i * 2^192. The upper 52 bits of a word
// give u = (bits + 1/2) / 2^52, and the noise is -log(-log(u)).

const WORD = (1n << 64n) - 1n;
const FACTORS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDING = 2 ** -48; // bounds the error of computing a score, relative to the largest

// Draws the samples with the given numbers. Returns [tokens, whether all are certified] of each.
//
// step: runs the graph prior_step; null if there is no learned prior, and all codes are equally
// likely. positions: tokens per sample. codes: the number of codes. kept: how many numbers keys, or
// values, have per sample. seed: a BigInt from 0 to 2^128 - 1. tolerance: the error
// { relative, floor } that log p may have; without it nothing is certified.
export async function draw(step, { positions, codes, kept }, seed, numbers, temperature, tolerance) {
  const noises = numbers.map((number) => gumbel(seed, number, positions * codes));
  const drawn = numbers.map(() => [[], tolerance !== undefined]);
  let keys = new Float32Array(numbers.length * kept);
  let values = keys;
  let likely = new Float32Array(numbers.length * codes);
  for (let s = 0; s < positions; s++) {
    if (step) {
      const previous = drawn.map(([tokens]) => tokens[s - 1] ?? 0);
      const found = await step({ previous, position: [s], keys, values }, numbers.length);
      [likely, keys, values] = [found.log_probabilities, found.next_keys, found.next_values];
    }
    drawn.forEach((one, i) => {
      const logP = likely.subarray(i * codes, (i + 1) * codes);
      const noise = noises[i].subarray(s * codes, (s + 1) * codes);
      const [best, sure] = choose(logP, noise, temperature, tolerance);
      one[0].push(best);
      one[1] &&= sure;
    });
  }
  return drawn;
}

// Returns the code with the best score (the first on a tie), and whether it is certified: no error
// that log p may have changes it.
function choose(logP, noise, temperature, tolerance) {
  let [best, most, next, size, largest] = [0, -Infinity, -Infinity, 0, 0];
  for (let k = 0; k < logP.length; k++) {
    const score = logP[k] / temperature + noise[k];
    if (score > most) [best, most, next] = [k, score, most];
    else if (score > next) next = score;
    size = Math.max(size, Math.abs(score));
    largest = Math.max(largest, Math.abs(logP[k]));
  }
  const error = tolerance ? tolerance.relative * Math.max(tolerance.floor, largest) : Infinity;
  return [best, most - next > (2 * error) / temperature + ROUNDING * size];
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

// Returns four words of 64 bits from a counter of four and a key of two. NumPy counts from 1.
function philox([a, b, c, d], [first, second]) {
  for (let round = 0; round < 10; round++) {
    const [left, right] = [FACTORS[0] * a, FACTORS[1] * c];
    [a, b, c, d] = [(right >> 64n) ^ b ^ first, right & WORD, (left >> 64n) ^ d ^ second, left & WORD];
    first = (first + STEPS[0]) & WORD;
    second = (second + STEPS[1]) & WORD;
  }
  return [a, b, c, d];
}
