"""The tokenizer inside other programs. Needs numpy and onnxruntime alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.bundle import Bundle
from vqdeploy.runtime.sessions import Runtime, Session, open_sessions
from vqref.host.images import as_batch
from vqref.spec import ModelSpec
from vqref.validation import Array, as_indices


class Codec:
    """Images to indices and back, from a bundle.

        codec = Codec.load("model-onnx")
        indices = codec.encode(images)           # int64 (N, S)
        reconstructions = codec.decode(indices)  # float32 (N, C, H, W) in [0, 1]

    spec       the model: image_shape (C, H, W), latent_shape and its product latent_size S,
               num_codes, code_size, likelihood
    device     "cpu" or "cuda", as chosen; "custom" if ``load`` was given providers
    providers  onnxruntime's execution providers, the preferred one first

    Methods may be called from several threads. Large inputs go through a few images at a time, so
    that memory stays flat. A Codec is a context manager, and can be pickled for worker processes,
    which open sessions of their own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        graphs: Mapping[str, bytes],
        device: str,
        batch: int | None,
        runtime: Runtime,
    ) -> None:
        sessions, self.device = open_sessions(graphs, spec, device, batch=batch, runtime=runtime)
        self.spec = spec
        self.providers = sessions["tokenizer"].providers
        self._sessions: dict[str, Session] | None = sessions
        self._made_from = (spec, dict(graphs), device, batch, runtime)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "auto",
        *,
        providers: Sequence[str | tuple[str, dict[str, Any]]] | None = None,
        session_options: Any = None,
        intra_op_num_threads: int | None = None,
        manifest_sha256: str | None = None,
    ) -> Codec:
        """Reads a bundle, checks its files against their digests and opens it on a device.

        device: "cpu", "cuda", or "auto", which takes CUDA if there is a card that can be used.
        providers: onnxruntime's, instead of ``device``; the first one must be usable.
        session_options: an onnxruntime.SessionOptions. intra_op_num_threads: threads within an
        operator. manifest_sha256: the digest that the bundle's manifest must have, as ``export``
        and ``verify`` print it.
        Raises InputError (a ValueError) for a damaged or another bundle, MachineError if "cuda" or
        the first provider cannot be used, ValueError for another device.
        """
        found = Bundle.open(bundle, manifest_sha256)
        graphs = {stage: found.graph(stage) for stage in ("tokenizer", "detokenizer")}
        runtime = Runtime(providers, session_options, intra_op_num_threads)
        return cls(found.spec, graphs, device, found.batch, runtime)

    def __enter__(self) -> Codec:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives onnxruntime's sessions back; later calls raise ValueError."""
        self._sessions = None

    def __getstate__(self) -> tuple[Any, ...]:
        if self._made_from[-1].session_options is not None:
            raise TypeError(
                "a Codec with session_options cannot be pickled: onnxruntime's options cannot"
            )
        return self._made_from

    def __setstate__(self, made_from: tuple[Any, ...]) -> None:
        self.__init__(*made_from)  # type: ignore[misc]

    def _run(self, stage: str, array: Array) -> Array:
        if self._sessions is None:
            raise ValueError("the Codec was closed")
        return self._sessions[stage](array)[0]

    def encode(self, images: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Indices (N, S), int64 from 0 to num_codes - 1, of N images.

        images: uint8, or floating in [0, 1]; (N, H, W) if C is 1, (N, C, H, W) or (N, H, W, C); or
        one image without its N, which is a batch of one.
        Raises InputError (a ValueError) for another shape, dtype or range, and for values that are
        not finite.
        """
        return self._run("tokenizer", as_batch(images, self.spec.image_shape))

    def decode(self, indices: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Reconstructions (N, C, H, W), float32 in [0, 1], of indices (N, S).

        Raises ValueError for another shape or dtype, and for an index outside 0 to num_codes - 1.
        """
        shape = ("N", self.spec.latent_size)
        return self._run("detokenizer", as_indices(indices, shape, self.spec.num_codes))

    def reconstruct(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """``decode(encode(images))``."""
        return self.decode(self.encode(images))

    def sample(self, n: int, *, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
        """Reconstructions (n, C, H, W) of indices that ``rng`` draws from the uniform prior.

        rng: a fresh generator if None.
        """
        rng = rng or np.random.default_rng()
        return self.decode(rng.integers(self.spec.num_codes, size=(n, self.spec.latent_size)))
