"""The tokenizer inside other programs. Needs numpy and onnxruntime alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vqdeploy.bundle import Bundle
from vqdeploy.sessions import Session, open_sessions
from vqref.images import as_batch
from vqref.spec import ModelSpec
from vqref.validation import as_indices


class Codec:
    """Images to indices and back, from a bundle.

        codec = Codec.load("model-onnx")
        indices = codec.encode(images)               # int64 (N, latent_size)
        probabilities = codec.decode(indices)        # float32 (N, C, H, W)

    spec       the model's sizes: image_shape (C, H, W), latent_size, num_codes, code_size
    device     "cpu" or "cuda": what was chosen
    providers  onnxruntime's execution providers, the first one preferred

    Methods may be called from several threads. Large inputs go through a few images at a time, so that memory stays flat.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Session, detokenizer: Session, device: str) -> None:
        self.spec = spec
        self.device = device
        self.providers = tokenizer.providers
        self._tokenizer, self._detokenizer = tokenizer, detokenizer

    @classmethod
    def load(cls, bundle: str | Path, device: str = "auto") -> Codec:
        """Reads a bundle, checks its files against their digests and opens it on "cpu", "cuda" or "auto".

        "auto" is CUDA where there is a card that can be used, and says so in ``device``. Raises InputError (a ValueError) for a
        bundle that is damaged, MachineError where "cuda" was asked for and cannot be used, ValueError for another device.
        """
        found = Bundle.open(bundle)
        graphs = {stage: found.graph(stage) for stage in ("tokenizer", "detokenizer")}
        sessions, chosen = open_sessions(graphs, found.spec, device)
        return cls(found.spec, sessions["tokenizer"], sessions["detokenizer"], chosen)

    def encode(self, images: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Indices (N, latent_size), int64 from 0 to num_codes - 1, of N images.

        images: uint8, or floating in [0, 1]; (N, H, W) where C is 1, (N, C, H, W) or (N, H, W, C).
        Raises InputError (a ValueError) for another shape, dtype or range, and for values that are not finite.
        """
        return self._tokenizer(as_batch(images, self.spec.image_shape))[0]

    def decode(self, indices: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Probabilities (N, C, H, W), float32 in [0, 1], of indices (N, latent_size): the mean grey levels.

        Raises ValueError for another shape or dtype, and for an index outside 0 to num_codes - 1.
        """
        return self._detokenizer(as_indices(indices, ("N", self.spec.latent_size), self.spec.num_codes))[0]

    def reconstruct(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """``decode(encode(images))``."""
        return self.decode(self.encode(images))

    def sample(self, n: int, *, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
        """Probabilities (n, C, H, W) of indices drawn from the uniform prior by ``rng``, a fresh generator if None."""
        rng = rng or np.random.default_rng()
        return self.decode(rng.integers(self.spec.num_codes, size=(n, self.spec.latent_size)))
