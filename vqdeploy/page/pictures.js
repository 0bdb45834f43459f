// Turns pictures into the images of a model, as the entry `preprocessing` of a bundle's manifest
// says. The result is Pillow's, to the last bit. Imports nothing, so it runs in a browser too.
//
// A picture is { width, height, channels, data }: 8 bits, row by row, the channels of a pixel
// together.

// Returns an image [C, H, W], channel by channel. picture: has 4 channels, red, green, blue and
// alpha, not premultiplied. orientation: the EXIF orientation, 1 to 8. done: the entry
// `preprocessing`.
export function prepare(picture, orientation, done, [channels, height, width]) {
  if (![1, 3, 4].includes(channels))
    throw new Error(`pictures do not have the model's ${channels} channels`);
  let found = upright(picture, orientation);
  if (channels !== 4) found = onBackground(found, done.background);
  if (channels === 1) found = grey(found);
  const box = done.crop ? middle(found, height, width) : [0, 0, found.width, found.height];
  if (done.size) found = resized(found, height, width, box);
  if (found.width !== width || found.height !== height)
    throw new Error(`${found.width}x${found.height} pixels, and the model was trained on ${width}x${height}`);
  return planar(found);
}

// Reorders pixels: from pixel by pixel to channel by channel.
export function planar({ width, height, channels, data }) {
  const size = width * height;
  return Uint8Array.from(data, (_, i) => data[(i % size) * channels + Math.floor(i / size)]);
}

// Reorders them back.
export function interleaved({ width, height, channels, data }) {
  return planar({ width: channels, height: 1, channels: width * height, data });
}

// Turns a picture as its EXIF data say. From orientation 5 on, x and y change places.
function upright({ width, height, channels, data }, orientation) {
  const aside = orientation > 4;
  const [w, h] = aside ? [height, width] : [width, height];
  const [right, below] = [[2, 3, 7, 8].includes(orientation), [3, 4, 6, 7].includes(orientation)];
  const turned = new Uint8Array(data.length);
  for (let y = 0, to = 0; y < h; y++) {
    for (let x = 0; x < w; x++, to += channels) {
      const [column, row] = aside ? [y, x] : [x, y];
      const from = (below ? height - 1 - row : row) * width + (right ? width - 1 - column : column);
      turned.set(data.subarray(from * channels, (from + 1) * channels), to);
    }
  }
  return { width: w, height: h, channels, data: turned };
}

// Changes each pixel by a function that takes its channels and returns `channels` new ones.
function mapped(picture, channels, change) {
  const data = new Uint8Array(picture.width * picture.height * channels);
  for (let from = 0, to = 0; to < data.length; from += picture.channels, to += channels)
    data.set(change(picture.data.subarray(from, from + picture.channels)), to);
  return { ...picture, channels, data };
}

function onBackground(picture, background) {
  const ground = [1, 3, 5].map((at) => parseInt(background.slice(at, at + 2), 16)); // "#rrggbb"
  const mixed = (level, below, alpha) => Math.round((level * alpha + below * (255 - alpha)) / 255);
  return mapped(picture, 3, (pixel) => ground.map((below, i) => mixed(pixel[i], below, pixel[3])));
}

function grey(picture) {
  return mapped(picture, 1, ([r, g, b]) => [(19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16]);
}

// Returns the largest box [left, top, right, bottom] in the middle of a picture that has the
// proportions of the image.
function middle({ width: w, height: h }, height, width) {
  if (w * height <= h * width) {
    const part = (w * height) / width;
    return [0, (h - part) / 2, w, (h + part) / 2];
  }
  const part = (h * width) / height;
  return [(w - part) / 2, 0, (w + part) / 2, h];
}

// Resizes a box of a picture by Lanczos' filter: across, then down, with 8 bits in between.
function resized(picture, height, width, box) {
  const [left, top, right, bottom] = box.map(Math.fround);
  const { width: w, height: h, channels } = picture;
  const across = (found) =>
    left || right !== w || width !== w ? filtered(found, true, left, right, width) : found;
  const down = (found) =>
    top || bottom !== h || height !== h ? filtered(found, false, top, bottom, height) : found;
  const both = (found) => down(across(found));
  const same = width === w && height === h; // then the box is the whole picture
  return channels === 4 && !same ? plain(both(premultiplied(picture))) : both(picture);
}

// Multiplies colours by their alpha.
const premultiplied = (picture) =>
  mapped(picture, 4, (pixel) => pixel.map((level, i) => (i < 3 ? Math.round((level * pixel[3]) / 255) : level)));

function plain(picture) {
  const level = (weighed, alpha) => (alpha ? Math.min(255, Math.trunc((255 * weighed) / alpha)) : weighed);
  return mapped(picture, 4, ([r, g, b, a]) => [level(r, a), level(g, a), level(b, a), a]);
}

function filtered({ width, height, channels, data }, across, start, end, size) {
  const [w, h] = across ? [size, height] : [width, size];
  // Distances between the levels of a line and between lines, in the picture and in the new one.
  const [step, line] = across ? [channels, width * channels] : [width * channels, channels];
  const [stepOut, lineOut] = across ? [channels, w * channels] : [w * channels, channels];
  const out = new Uint8ClampedArray(w * h * channels);
  weights(across ? width : height, start, end, size).forEach(([first, factors], place) => {
    for (let i = 0; i < (across ? height : width); i++) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = 1 << 21; // a half, with 22 bits after the point
        for (let k = 0; k < factors.length; k++)
          sum += factors[k] * data[i * line + (first + k) * step + channel];
        out[i * lineOut + place * stepOut + channel] = sum >> 22;
      }
    }
  });
  return { width: w, height: h, channels, data: out };
}

// Returns [first, factors] for each of `size` places between start and end: the first level that
// counts there, and the factors of it and the next ones, in units of 2^-22.
function weights(length, start, end, size) {
  const scale = Math.fround(end - start) / size;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: size }, (_, place) => {
    const centre = start + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 3 * stretch + 0.5));
    const last = Math.min(length, Math.trunc(centre + 3 * stretch + 0.5));
    const distance = (k) => (k + first - centre + 0.5) * (1 / stretch);
    const raw = Array.from({ length: last - first }, (_, k) => lanczos(distance(k)));
    const sum = raw.reduce((a, b) => a + b, 0);
    return [first, raw.map((w) => Math.trunc((w / sum) * 2 ** 22 + (w < 0 ? -0.5 : 0.5)))];
  });
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const lanczos = (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0);
