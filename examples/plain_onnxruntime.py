"""Prints the tokens of images as JSON, with numpy, onnxruntime and, for pictures, Pillow alone:
`python plain_onnxruntime.py BUNDLE IMAGES... [--decode FOLDER]`.

IMAGES is an .npy file of uint8 images, (N, C, H, W) or (N, H, W, C), also (N, H, W) if C is 1; or
any number of pictures, to which is done what was done to those that the model was trained on. The
bundle's manifest says what that was, and what the graphs are called, take and give; their bytes are
held to the manifest's sha256 before onnxruntime sees them. With --decode, what the model makes of
each image goes to FOLDER as 0.png, 1.png, ….
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, which starts it
import onnxruntime as ort

BATCH = 64  # images per call, unless the graphs take one number alone


def main(bundle, files, folder):
    manifest = json.loads((bundle / "manifest.json").read_text())
    shape = manifest["spec"]["image_shape"]  # [C, H, W]
    if [path.suffix for path in files] == [".npy"]:
        images = channels_first(np.load(files[0], allow_pickle=False), shape)
    else:
        images = np.stack([picture(path, manifest["preprocessing"], shape) for path in files])

    encode = opened(bundle, manifest, "tokenizer")
    size = manifest["batch"] or BATCH
    starts = range(0, len(images), size)
    levels = (images[i : i + size].astype(np.float32) / np.float32(255) for i in starts)
    tokens = [encode(part)[0] for part in levels]  # each (n, S)
    print(json.dumps([row for part in tokens for row in part.tolist()]))

    if folder:
        decode = opened(bundle, manifest, "detokenizer")
        save(folder, [image for part in tokens for image in decode(part)[0]])


def channels_first(images, shape):
    """uint8 images (N, C, H, W), of those or of (N, H, W, C)."""
    channels, height, width = shape
    if channels == 1 and images.ndim == 3:
        images = images[:, None]
    first, last = ([*images.shape[1:]] == each for each in (shape, [height, width, channels]))
    if images.dtype != np.uint8 or first == last:
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"images are {found}, expected uint8 (N, C, H, W), {shape} each")
    return images if first else images.transpose(0, 3, 1, 2)


def opened(bundle, manifest, stage):
    """A function that runs a graph on as many images as the graph takes, or fewer, and returns its
    outputs. Each input but ``position`` has a row per image."""
    graph = manifest["graphs"][stage]
    content = (bundle / graph["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][graph["file"]]["sha256"]:
        raise ValueError(f"{graph['file']}: damaged")
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*arrays):
        count, given = len(arrays[0]), {}
        for port, array in zip(graph["inputs"], arrays, strict=True):
            rows = 1 if port["name"] == "position" else manifest["batch"] or count
            given[port["name"]] = np.zeros((rows, *array.shape[1:]), port["dtype"])
            given[port["name"]][: len(array)] = array
        names = [port["name"] for port in graph["outputs"]]
        return [output[:count] for output in session.run(names, given)]

    return run


def picture(path, done, shape):
    """The picture in a file as an image (C, H, W), uint8.

    done: {"size": [H, W] or null, "crop", "channels", "background": "#rrggbb"}.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in (1, 3, 4):
        raise ValueError(f"{path}: pictures do not have the model's {channels} channels")
    with Image.open(path) as file:
        found = ImageOps.exif_transpose(file)
    if found.mode.startswith("I;16") or (file.format == "PPM" and found.mode == "I"):
        levels = np.asarray(found)  # of 16 bits, of which the upper 8 are kept
        shown = levels != found.info.get("transparency", -1)
        found = Image.fromarray((levels >> 8).astype(np.uint8))
        found.putalpha(Image.fromarray(np.where(shown, 255, 0).astype(np.uint8)))
    if found.mode in ("I", "F"):
        raise ValueError(f"{path}: its levels have no known range")
    found = found.convert("RGBA")
    if channels != 4:
        ground = Image.new("RGB", found.size, done["background"])
        ground.paste(found, mask=found)
        found = ground.convert("L" if channels == 1 else "RGB")
    if done["size"]:
        (w, h), mode, lanczos = found.size, found.mode, Image.Resampling.LANCZOS
        left, top, right, bottom = middle(w, h, height, width) if done["crop"] else (0, 0, w, h)
        if (w, h) != (width, height):  # in two steps, whose order is Pillow's own in one
            found = found.convert("RGBa") if mode == "RGBA" else found
            found = found.resize((width, h), lanczos, (left, 0, right, h))
            found = found.resize((width, height), lanczos, (0, top, width, bottom)).convert(mode)
    if found.size != (width, height):
        own = "{}x{}".format(*found.size)
        raise ValueError(f"{path}: {own} pixels, and the model was trained on {width}x{height}")
    return np.asarray(found).reshape(height, width, channels).transpose(2, 0, 1)


def middle(w, h, height, width):
    """The largest box in the middle of w x h pixels that is as wide for its height as the image."""
    if w * height <= h * width:
        part = w * height / width
        return 0, (h - part) / 2, w, (h + part) / 2
    part = h * width / height
    return (w - part) / 2, 0, (w + part) / 2, h


def save(folder, reconstructions):
    """Writes (C, H, W) in [0, 1] each as a picture."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i, reconstruction in enumerate(reconstructions):
        levels = np.round(255 * reconstruction).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(levels.squeeze()).save(folder / f"{i}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("bundle", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--decode", type=Path)
    given = parser.parse_args()
    try:
        main(given.bundle, given.files, given.decode)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
