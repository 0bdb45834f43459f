// Shows images on canvases, and lets people draw on one. An image is [C, H, W], channel by channel.

// Shows an image whose levels are in [0, white]. With two channels, or more than four, only the
// first is shown.
export function paint(canvas, image, [channels, height, width], white = 1) {
  canvas.width = width;
  canvas.height = height;
  const [size, shown] = [width * height, [1, 3, 4].includes(channels) ? channels : 1];
  const pixels = new ImageData(width, height);
  for (let i = 0; i < size; i++) {
    for (let channel = 0; channel < 4; channel++) {
      const from = shown === 1 ? 0 : channel;
      const opaque = channel === 3 && shown < 4;
      pixels.data[4 * i + channel] = opaque ? 255 : Math.round((255 / white) * image[from * size + i]);
    }
  }
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
}

// Lets people draw on a canvas, with a pointer, or with arrow keys and space.
//
// pen: the element that shows where the keyboard's pen is. style: returns { colour, width }.
// changed: called after each stroke of the pen.
export function drawable(canvas, pen, style, changed) {
  let last = null; // where the pointer was, while it is down
  let [place, down] = [null, false]; // the keyboard's pen
  const context = () => canvas.getContext("2d", { willReadFrequently: true });

  function line(from, to) {
    const { colour, width } = style();
    Object.assign(context(), { strokeStyle: colour, lineWidth: width, lineCap: "round" });
    context().beginPath();
    context().moveTo(...from);
    context().lineTo(...to);
    context().stroke();
    changed();
  }

  function pointed(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    return [(x / box.width) * canvas.width, (y / box.height) * canvas.height];
  }

  function showPen() {
    pen.hidden = place === null;
    pen.classList.toggle("down", down);
    if (!place) return;
    pen.style.left = `${(100 * place[0]) / canvas.width}%`;
    pen.style.top = `${(100 * place[1]) / canvas.height}%`;
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = pointed(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = pointed(event);
    line(last, next);
    last = next;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));

  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step && event.key !== " ") return;
    event.preventDefault();
    place ??= [canvas.width / 2, canvas.height / 2];
    const before = place;
    if (step) {
      const stride = Math.max(1, canvas.width / 64);
      place = [canvas.width, canvas.height].map((most, i) => Math.min(most, Math.max(0, place[i] + stride * step[i])));
    } else down = !down;
    if (down) line(before, place);
    showPen();
  });
  canvas.addEventListener("blur", () => {
    [place, down] = [null, false];
    showPen();
  });
}
