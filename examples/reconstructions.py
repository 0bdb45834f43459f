"""Draws images above what a bundle makes of them:
`python examples/reconstructions.py BUNDLE IMAGES PICTURE.png`.

IMAGES is an .npz or .npy file of uint8 images (N, H, W), (N, C, H, W) or (N, H, W, C). A program
like this one needs numpy, onnxruntime and Pillow, nothing else.
"""

import sys

import numpy as np
from PIL import Image

from vqdeploy import Codec

SCALE = 3  # screen pixels per pixel
GAP = 2  # pixels between images


def main(bundle: str, images_file: str, picture: str) -> None:
    loaded = np.load(images_file)
    images = (loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded)[:16]

    codec = Codec.load(bundle)
    indices = codec.encode(images)
    reconstructions = codec.decode(indices)  # (N, C, H, W)
    print(f"{len(images)} images on {codec.device}; tokens of the first: {indices[0].tolist()}")

    below = reconstructions.transpose(0, 2, 3, 1)  # (N, H, W, C)
    if images.ndim == 4 and images.shape[1:] == reconstructions.shape[1:]:
        images = images.transpose(0, 2, 3, 1)
    above = images.reshape(below.shape) / 255
    rows = [np.concatenate([frame(image) for image in row], axis=1) for row in (above, below)]
    sheet = np.concatenate(rows, axis=0).repeat(SCALE, axis=0).repeat(SCALE, axis=1)
    levels = np.round(255 * sheet).astype(np.uint8)
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(picture)
    print(f"wrote {picture}")


def frame(image: np.ndarray) -> np.ndarray:
    """The image with a white border."""
    return np.pad(image, ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=1.0)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
