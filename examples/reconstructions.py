"""Draws images above what a bundle makes of them: `python examples/reconstructions.py BUNDLE IMAGES PICTURE.png`.

IMAGES is an .npz or .npy file of uint8 images. A program like this one needs numpy, onnxruntime and Pillow, nothing else.
"""

import sys

import numpy as np
from PIL import Image

from vqdeploy import Codec

SCALE = 3  # screen pixels a pixel
GAP = 2  # pixels between images


def main(bundle: str, images_file: str, picture: str) -> None:
    loaded = np.load(images_file)
    images = (loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded)[:16]

    codec = Codec.load(bundle)
    indices = codec.encode(images)
    probabilities = codec.decode(indices)
    print(f"{len(images)} images on {codec.device}; their tokens: {indices.ravel().tolist()}")

    above = images / 255
    below = probabilities[:, 0]
    rows = [np.concatenate([frame(image) for image in row], axis=1) for row in (above, below)]
    sheet = np.concatenate(rows, axis=0).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    Image.fromarray(np.round(255 * sheet).astype(np.uint8)).save(picture)
    print(f"wrote {picture}")


def frame(image: np.ndarray) -> np.ndarray:
    return np.pad(image, GAP, constant_values=1.0)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
