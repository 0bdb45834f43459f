// The page: shows results and handles input. The worker computes.

import { TokenMap } from "./map.js";
import { drawable, paint } from "./paint.js";

const SAMPLES = 8;

const at = (id) => document.getElementById(id);
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();

worker.onmessage = ({ data: { id, row, result, error } }) => {
  const { tell, resolve, reject } = waiting.get(id);
  if (row) return tell(row);
  waiting.delete(id);
  return error === undefined ? resolve(result) : reject(new Error(error));
};
worker.onerror = (event) => fail(new Error(event.message ?? "this browser cannot load the model"));

function ask(name, argument, tell) {
  const id = waiting.size ? Math.max(...waiting.keys()) + 1 : 0;
  worker.postMessage({ id, name, argument });
  return new Promise((resolve, reject) => waiting.set(id, { tell, resolve, reject }));
}

const say = (text) => (at("status").textContent = text);

function fail(error) {
  at("error").textContent = error.message;
  at("error").hidden = false;
}

// Runs work that may fail, and shows the reason.
async function attempt(work) {
  at("error").hidden = true;
  try {
    return await work();
  } catch (error) {
    return fail(error);
  }
}

const { manifest, facts, start } = await attempt(() => ask("start")) ?? {};
if (manifest) begin();

function begin() {
  const { spec, preprocessing } = manifest;
  const shape = spec.image_shape; // [C, H, W]
  const [channels, height, width] = shape;
  const state = { image: start, own: [], tokens: [], place: null };

  const map = new TokenMap(at("map"), spec.latent_shape, facts.colours, choose);
  const grid = spec.latent_shape.join("×");
  at("model").textContent =
    `A picture of ${height}×${width} pixels becomes ${grid} tokens, each one of ${spec.num_codes} codes, ` +
    "and the tokens become a picture again.";
  at("preprocessing").textContent = facts.pictures;

  // Returns a function that runs a task. Calls during a run lead to one more run, after it.
  function latest(task) {
    let [busy, again] = [false, false];
    return async () => {
      again = true;
      if (busy) return;
      busy = true;
      while (again) {
        again = false;
        await attempt(task);
      }
      busy = false;
    };
  }

  const encoded = latest(async () => {
    const tokens = await ask("encode", state.image);
    document.body.dataset.encoded = Number(document.body.dataset.encoded ?? 0) + 1;
    [state.own, state.tokens] = [tokens, [...tokens]];
    await decoded();
    if (!at("loaded").textContent) await tellLoaded();
  });

  const decoded = latest(async () => {
    map.show(state.tokens, state.own);
    at("undo").disabled = String(state.tokens) === String(state.own);
    const [image] = await ask("decode", [state.tokens]);
    paint(at("reconstruction"), image, shape);
    showDifference(image);
    if (state.place !== null) await showCode();
  });

  function showDifference(reconstruction) {
    const original = Float64Array.from(state.image, (level) => level / 255);
    const off = original.map((level, i) => reconstruction[i] - level);
    const colours = off.slice(0, (channels === 4 ? 3 : channels) * height * width); // not alpha
    paint(at("difference"), colours.map((d) => 0.5 + d / 2), [channels === 4 ? 3 : channels, height, width]);
    const error = off.reduce((sum, d) => sum + d * d, 0) / off.length;
    const psnr = error ? `, PSNR ${(-10 * Math.log10(error)).toFixed(1)} dB` : "";
    at("error-size").textContent =
      `Grey where both are equal; mean squared error ${error.toPrecision(2)}${psnr}.`;
  }

  async function tellLoaded() {
    const seconds = performance.now() / 1000;
    const entries = performance.getEntries().filter(({ encodedBodySize }) => encodedBodySize);
    const bytes = entries.reduce((sum, entry) => sum + entry.encodedBodySize, await ask("bytes"));
    Object.assign(document.body.dataset, { bytes, seconds });
    at("loaded").textContent =
      `${(bytes / 2 ** 20).toFixed(1)} MiB loaded, first tokens after ${seconds.toFixed(1)} seconds.`;
    say("Ready.");
  }

  // Pictures

  const picture = at("picture");
  picture.setAttribute("aria-label", `Picture, ${width} by ${height} pixels`);
  paint(picture, state.image, shape, 255);

  function ofCanvas() {
    const { data } = picture.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
    const size = width * height;
    if (channels !== 1) return Uint8Array.from({ length: channels * size }, (_, i) => data[4 * (i % size) + Math.floor(i / size)]);
    return Uint8Array.from({ length: size }, (_, i) => (19595 * data[4 * i] + 38470 * data[4 * i + 1] + 7471 * data[4 * i + 2] + 0x8000) >> 16);
  }

  async function open(file) {
    say(`Reading ${file.name} …`);
    const found = await ask("prepare", file);
    state.image = found.image;
    paint(picture, state.image, shape, 255);
    await encoded();
    const size = `${found.height}×${found.width}`;
    const exactly = found.exact ? "read exactly as the package does" : "this browser may read it a level differently from the package";
    say(`${file.name}, ${size} pixels: ${exactly}.`);
  }

  if (facts.drawable) {
    at("width").value = Math.max(1, width / 14);
    at("width").max = Math.max(4, width / 4);
    const style = () => ({ colour: at("colour").value, width: Number(at("width").value) });
    drawable(picture, at("pen"), style, () => {
      state.image = ofCanvas();
      encoded();
    });
    at("clear").addEventListener("click", () => {
      const context = picture.getContext("2d", { willReadFrequently: true });
      context.fillStyle = channels === 1 ? "#000000" : preprocessing.background;
      context.fillRect(0, 0, width, height);
      state.image = ofCanvas();
      encoded();
    });
    if (channels !== 1) at("colour").value = "#d03020";
    at("file").addEventListener("change", ({ target }) => {
      const [file] = target.files;
      target.value = "";
      if (file) attempt(() => open(file));
    });
    addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    addEventListener("dragleave", () => document.body.classList.remove("dropping"));
    addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dropping");
      const [file] = event.dataTransfer.files;
      if (file) attempt(() => open(file));
    });
  } else {
    at("drawing-tools").hidden = true;
    at("drawing").textContent = facts.pictures;
  }

  // Tokens

  function choose(place) {
    state.place = place;
    map.choose(place);
    at("token").hidden = false;
    attempt(showCode);
  }

  function swap(code) {
    state.tokens[state.place] = code;
    decoded();
  }

  async function showCode() {
    const { place } = state;
    const code = state.tokens[place];
    at("token-title").textContent = `Token at ${map.where(place)}: code ${code}`;
    at("code").value = code;
    at("code").max = spec.num_codes - 1;
    at("restore").disabled = code === state.own[place];
    const { vector, near } = await ask("code", code);
    const [low, high] = [Math.min(...vector), Math.max(...vector)];
    at("vector-text").textContent =
      `The code is a vector of ${vector.length} numbers, here as bars, from ${low.toPrecision(3)} to ${high.toPrecision(3)}.`;
    at("vector").setAttribute("aria-label", `The numbers of code ${code}`);
    bars(at("vector"), vector);
    const rows = near.map((one) => state.tokens.map((token, i) => (i === place ? one.code : token)));
    const images = await ask("decode", rows);
    if (place !== state.place || code !== state.tokens[place]) return; // another was chosen since
    const cards = near.map((one, i) => card(images[i], `code ${one.code}`, () => swap(one.code)));
    at("near").replaceChildren(...cards);
  }

  function card(image, caption, chosen) {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    button.type = "button";
    paint(canvas, image, shape);
    button.append(canvas, caption);
    button.addEventListener("click", chosen);
    return button;
  }

  at("code").addEventListener("change", ({ target }) => {
    const code = Number(target.value);
    if (target.value !== "" && Number.isInteger(code) && code >= 0 && code < spec.num_codes) swap(code);
    else target.value = state.tokens[state.place];
  });
  at("restore").addEventListener("click", () => swap(state.own[state.place]));
  at("undo").addEventListener("click", () => {
    state.tokens = [...state.own];
    decoded();
  });

  // Samples

  at("prior").textContent = manifest.prior
    ? "Drawn from the learned prior. A seed gives the same tokens on every machine where they are certified. A low temperature gives likelier pictures."
    : "The model has no learned prior: every code is as likely as every other, whatever the temperature.";
  at("sampling").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async () => {
      say("Drawing …");
      const seed = BigInt(at("seed").value);
      const { drawn, images } = await ask("sample", { seed, count: SAMPLES, temperature: Number(at("temperature").value) });
      const cards = drawn.map(([tokens, sure], i) => {
        const told = manifest.prior && sure ? ", certified" : "";
        const shown = card(images[i], `sample ${i + 1}${told}`, () => take(tokens, images[i]));
        shown.dataset.tokens = tokens;
        return shown;
      });
      at("samples").replaceChildren(...cards);
      const certified = manifest.prior ? `, ${drawn.filter(([, sure]) => sure).length} certified` : "";
      say(`${SAMPLES} samples${certified}. Choose one to look at its tokens.`);
    });
  });

  function take(tokens, image) {
    state.image = Uint8Array.from(image, (level) => Math.round(255 * level));
    [state.own, state.tokens] = [tokens, [...tokens]];
    paint(picture, state.image, shape, 255);
    decoded();
  }

  // The report

  at("verify").addEventListener("click", () =>
    attempt(async () => {
      const body = at("report").querySelector("tbody");
      body.replaceChildren();
      at("verify").disabled = true;
      at("verdict").textContent = "Verifying …";
      at("report").hidden = false;
      let wrong = 0;
      try {
        const done = await ask("verify", null, (row) => {
          wrong += row.wrong;
          body.append(reported(row));
        });
        const digests = done.digests
          ? "Every graph has the digest of the manifest."
          : "Digests were not checked: browsers compute none for pages without https.";
        const verdict = wrong ? `Wrong: ${wrong} answers are not the oracle’s.` : "Verified: what runs here is what was trained.";
        at("verdict").textContent = `${verdict} ${digests}`;
      } catch (error) {
        at("verdict").textContent = "Not verified.";
        throw error;
      } finally {
        at("verify").disabled = false;
      }
    }),
  );

  encoded();
}

function reported({ name, compared, largest, rms, tolerance, certified, ties, flips, wrong }) {
  const row = document.createElement("tr");
  const title = document.createElement("th");
  title.scope = "row";
  title.textContent = name;
  const errors = [largest, rms, tolerance].map((error) => error?.toExponential(1) ?? "–");
  const counts = [certified, ties, flips].map((count) => count ?? "–");
  for (const text of [compared, ...errors, ...counts, wrong]) row.insertCell().textContent = text;
  row.prepend(title);
  row.classList.toggle("wrong", wrong > 0);
  return row;
}

// Draws the numbers of a vector as bars from a line at 0.
function bars(canvas, vector) {
  const box = canvas.getBoundingClientRect();
  const [width, height] = [canvas.width, canvas.height] = [Math.round(2 * box.width), Math.round(2 * box.height)];
  const most = Math.max(...vector.map(Math.abs)) || 1;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(canvas).getPropertyValue("--accent");
  const each = width / vector.length;
  vector.forEach((value, i) => {
    const tall = (value / most) * (height / 2);
    context.fillRect(i * each + each / 8, height / 2 - Math.max(tall, 0), (3 * each) / 4, Math.max(1, Math.abs(tall)));
  });
}
