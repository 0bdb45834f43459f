"""Draws docs/overview.png: `python docs/make/overview.py BUNDLE IMAGES NUMBER ...`.

Images above their reconstructions above their tokens, as a run draws them after each epoch. BUNDLE
is of a grid of tokens, IMAGES an .npz of uint8 images, NUMBERs say which of them.
"""

import sys
from pathlib import Path

import numpy as np

from vqdeploy import Codec
from vqref.host.colours import code_colours
from vqtrain.run.pictures import save_tokens

OUTPUT = Path(__file__).parent.parent / "overview.png"


def main(bundle: str, file: str, *numbers: str) -> None:
    """Draws the images of these numbers."""
    with np.load(file) as arrays:
        images = arrays[arrays.files[0]]
    with Codec.load(bundle, "cpu") as codec:
        indices = codec.encode(images)
        hits = np.bincount(indices.ravel(), minlength=codec.spec.num_codes)
        colours = code_colours(codec.codebook, hits)
        shown = [int(number) for number in numbers]
        chosen = images[shown].transpose(0, 3, 1, 2) / np.float32(255)
        decoded = codec.decode(indices[shown])
        save_tokens(OUTPUT, codec.spec, chosen, decoded, indices[shown], colours)


if __name__ == "__main__":
    main(*sys.argv[1:])
