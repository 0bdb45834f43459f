// Prints the tokens of images as JSON, without Python: after `npm install`,
// `node tokens.js BUNDLE IMAGES... [--decode FOLDER]`.
//
// IMAGES is an .npy file of uint8 images, (N, C, H, W) or (N, H, W, C), also (N, H, W) if C is 1; or
// any number of pictures, to which is done what was done to those that the model was trained on. The
// bundle's manifest says what that was, and what the graphs are called, take and give. With --decode,
// what the model makes of each image goes to FOLDER as 0.png, 1.png, …. onnxruntime-web runs in node
// as it does in a browser: vqdeploy/page/ is such a page.

import { mkdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-web";
import sharp from "sharp";
import { each, opened } from "../../vqdeploy/page/graphs.js";
import { interleaved, planar, prepare } from "../../vqdeploy/page/pictures.js";

const FORMATS = ["gif", "jpeg", "png", "tiff", "webp"]; // which sharp reads as Pillow does

async function main() {
  const options = { decode: { type: "string" } };
  const { positionals, values } = parseArgs({ options, allowPositionals: true });
  const [bundle, ...files] = positionals;
  if (!files.length) throw new Error("usage: node tokens.js BUNDLE IMAGES... [--decode FOLDER]");
  const manifest = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
  const shape = manifest.spec.image_shape; // [C, H, W]
  const arrays = files.length === 1 && files[0].endsWith(".npy");
  const images = arrays ? channelsFirst(readNpy(await readFile(files[0])), shape) : [];
  if (!arrays) for (const file of files) images.push(await picture(file, manifest.preprocessing, shape));

  ort.env.wasm.numThreads = 1;
  const levels = images.map((image) => Float64Array.from(image, (level) => level / 255));
  const tokens = await run(bundle, manifest, "tokenizer", levels);
  console.log(JSON.stringify(tokens));

  if (values.decode) {
    await save(values.decode, await run(bundle, manifest, "detokenizer", tokens), shape);
  }
}

function readNpy(content) {
  if (content.subarray(0, 6).toString("latin1") !== "\x93NUMPY") throw new Error("not an .npy file");
  const start = content[6] === 1 ? 10 : 12;
  const size = content[6] === 1 ? content.readUInt16LE(8) : content.readUInt32LE(8);
  const header = content.subarray(start, start + size).toString("latin1");
  if (!header.includes("'|u1'") || !header.includes("'fortran_order': False"))
    throw new Error("images are not uint8 in C order");
  const sizes = header.match(/'shape': \(([^)]*)\)/)[1].split(",");
  const shape = sizes.filter((part) => part.trim()).map(Number);
  return { shape, data: content.subarray(start + size) };
}

// Images [C, H, W], channel after channel, of an array (N, C, H, W) or (N, H, W, C).
function channelsFirst(array, [channels, height, width]) {
  let [count, ...inner] = array.shape;
  if (channels === 1 && inner.length === 2) inner = [1, ...inner];
  const wanted = String([channels, height, width]);
  const first = String(inner) === wanted;
  const last = String(inner) === String([height, width, channels]);
  if (first === last)
    throw new Error(`images are (${array.shape}), expected uint8 (N, C, H, W), ${wanted} each`);
  const size = channels * height * width;
  const images = Array.from({ length: count }, (_, i) => array.data.subarray(i * size, (i + 1) * size));
  return first ? images : images.map((data) => planar({ width, height, channels, data }));
}

// The picture in a file as an image [C, H, W]. Of 16 bits sharp gives the upper 8.
async function picture(file, done, shape) {
  try {
    const source = sharp(file, { ignoreIcc: true });
    const { format, space, depth, orientation } = await source.metadata();
    if (!FORMATS.includes(format)) throw new Error(`${format} is not read here`);
    if (!["uchar", "ushort"].includes(depth)) throw new Error("its levels have no known range");
    if (space === "cmyk") throw new Error("CMYK is not read here");
    const { data, info } = await source.ensureAlpha().raw().toBuffer({ resolveWithObject: true });
    return prepare({ ...info, data }, orientation ?? 1, done, shape);
  } catch (error) {
    throw new Error(`${file}: ${error.message}`);
  }
}

// What one of the graphs makes of arrays, one an image.
async function run(bundle, manifest, stage, arrays) {
  const { file, outputs } = manifest.graphs[stage];
  const graph = await opened(ort, manifest, stage, await readFile(join(bundle, file)));
  const found = await each(graph, manifest, stage, arrays);
  return found[outputs[0].name].map((array) => Array.from(array));
}

// Writes reconstructions, [C, H, W] in [0, 1] each.
async function save(folder, reconstructions, [channels, height, width]) {
  await mkdir(folder, { recursive: true });
  for (const [i, reconstruction] of reconstructions.entries()) {
    const levels = reconstruction.map((level) => Math.round(255 * level));
    const data = interleaved({ width, height, channels, data: levels });
    await sharp(data, { raw: { width, height, channels } }).png().toFile(join(folder, `${i}.png`));
  }
}

await main().catch((error) => {
  console.error(error.message.split("\n")[0]);
  process.exitCode = 1;
});
