"""Makes a bundle of a PyTorch network of one's own: `python own_network.py FOLDER`.

``Tokenizer`` stands for a network that no family covers. ``rows_of`` writes it as rows,
``params_of`` says which of its tensors is which parameter, and ``compare`` holds the module to the
oracle, which computes the rows in float64. FOLDER gets ``model.pt`` and the folder ``bundle``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import vqref
from vqdeploy import Codec
from vqdeploy.export import export
from vqdeploy.sources import write_model
from vqdeploy.verify import verify
from vqref.agreement import Backend, compare
from vqref.families import Stack
from vqref.modelfile import Model
from vqref.spec import CODEBOOK, ModelSpec

SIDE, PATCH, WIDTH, HEADS = 32, 4, 24, 2  # pixels, pixels, channels, of attention
NUM_CODES, CODE_SIZE = 64, 8


class Tokenizer(nn.Module):
    """Patches, a block of a transformer, the nearest code of each place, and back to pixels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.to_latents = nn.Linear(WIDTH, CODE_SIZE)
        self.codebook = nn.Embedding(NUM_CODES, CODE_SIZE)
        self.from_codes = nn.Linear(CODE_SIZE, WIDTH)
        self.up1 = nn.ConvTranspose2d(WIDTH, WIDTH, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(WIDTH, 3, 4, stride=2, padding=1)

    def encode(self, images):
        """Latents (N, S, D) of images (N, 3, H, W) in [0, 1]."""
        x = self.patches(2 * images - 1).flatten(2).mT  # (N, S, F)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return self.to_latents(x + self.mlp(self.norm2(x)))

    def tokens(self, latents):
        """The nearest codes, (N, S)."""
        return torch.cdist(latents, self.codebook.weight[None]).argmin(dim=2)

    def decode(self, quantized):
        """Outputs (N, 3, H, W) in about [-1, 1]."""
        x = self.from_codes(quantized).mT.unflatten(2, (SIDE // PATCH, SIDE // PATCH))
        return self.up2(self.up1(x).relu())


def rows_of():
    """The network as rows; a row takes the one before unless it says otherwise."""
    image, grid = (3, SIDE, SIDE), (SIDE // PATCH, SIDE // PATCH)
    places = (grid[0] * grid[1], WIDTH)

    encoder = Stack("encoder", image)
    encoder.row("scale", "affine", image, scale=2.0, shift=-1.0)
    encoder.conv("patches", WIDTH, PATCH, stride=PATCH, same=False)
    x = encoder.row("vectors", "to_vectors", places)
    h = encoder.row("norm1", "layer_norm", places)
    seen = [encoder.row(name, "dense", places, of=h).name for name in ("query", "key", "value")]
    encoder.row("attention", "attention", places, inputs=tuple(seen), heads=HEADS)
    added = encoder.row("out", "dense", places)
    x = encoder.row("sum1", "add", places, inputs=(x.name, added.name))
    encoder.row("norm2", "layer_norm", places)
    encoder.row("wide", "dense", (places[0], 2 * WIDTH), activation="gelu")
    added = encoder.row("narrow", "dense", places)
    encoder.row("sum2", "add", places, inputs=(x.name, added.name))
    latents = encoder.row("latents", "dense", (places[0], CODE_SIZE)).out_shape

    decoder = Stack("decoder", latents)
    decoder.row("from_codes", "dense", places)
    decoder.row("grid", "to_grid", (WIDTH, *grid))
    decoder.conv_transpose("up1", WIDTH, 4, stride=2, activation="relu")
    decoder.conv_transpose("up2", 3, 4, stride=2)

    rows = encoder.rows, decoder.rows
    sizes = image, grid, NUM_CODES, CODE_SIZE
    return ModelSpec("patches", *sizes, "gaussian", *rows, value_range=(-1.0, 1.0))


NAMES = {
    "encoder.patches": "patches",
    "encoder.norm1": "norm1",
    "encoder.out": "attention.out_proj",
    "encoder.norm2": "norm2",
    "encoder.wide": "mlp.0",
    "encoder.narrow": "mlp.2",
    "encoder.latents": "to_latents",
    "decoder.from_codes": "from_codes",
    "decoder.up1": "up1",
    "decoder.up2": "up2",
}
"""Rows of ours, and modules of theirs whose weight and bias they have."""


def params_of(module):
    """The module's tensors by the names of the rows."""
    theirs = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    ours = {CODEBOOK: theirs.pop("codebook.weight")}
    for part in ("weight", "bias"):
        for row, name in NAMES.items():
            ours[f"{row}.{part}"] = theirs.pop(f"{name}.{part}")
        packed = np.split(theirs.pop(f"attention.in_proj_{part}"), 3)
        for name, each in zip(("query", "key", "value"), packed, strict=True):
            ours[f"encoder.{name}.{part}"] = each
    if theirs:
        raise ValueError(f"no row has {', '.join(theirs)}")
    return vqref.averaged(ours)


def backend_of(module):
    """The module as ``compare`` asks it: arrays in, arrays out."""

    def encoder(images):
        return module.encode(torch.from_numpy(images)).numpy()

    def decoder(quantized):
        outputs = module.decode(torch.from_numpy(quantized)).numpy()
        return outputs, np.clip(outputs / 2 + 0.5, 0, 1)

    def tokenizer(images):
        return module.tokens(module.encode(torch.from_numpy(images))).numpy()

    return Backend("float32", encoder=encoder, decoder=decoder, tokenizer=tokenizer)


def trained():
    """Stands for a module that was trained: random weights, and latents as codes."""
    torch.manual_seed(0)
    module = Tokenizer().eval().requires_grad_(False)
    module.codebook.weight.copy_(module.encode(torch.rand(1, 3, SIDE, SIDE))[0, :NUM_CODES])
    return module


def main(folder):
    module = trained()
    model = Model(rows_of(), params_of(module))
    images = np.random.default_rng(0).random((16, 3, SIDE, SIDE), np.float32)
    print(compare(model.spec, model.params, images, backend_of(module)).require())

    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.pt", model)
    export(folder / "model.pt", folder / "bundle")
    print(verify(folder / "bundle").report.require())

    with Codec.load(folder / "bundle") as codec:
        tokens = codec.encode(images)
    equal = tokens == module.tokens(module.encode(torch.from_numpy(images))).numpy()
    print(f"{equal.mean():.2%} of the tokens are the module's")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
