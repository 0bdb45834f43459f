"""The Codec: a tokenizer to use in other programs.

It needs only numpy and onnxruntime, and Pillow to read pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from operator import index
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from vqdeploy.bundle import Bundle
from vqdeploy.runtime.sessions import Runtime, Session, open_sessions
from vqdeploy.stages import PRIOR_STAGES
from vqref.host.images import as_batch
from vqref.host.streams import plain
from vqref.spec import CODEBOOK
from vqref.validation import Array, as_indices

if TYPE_CHECKING:
    from vqdeploy.sampling import Drawn
    from vqref.prior import PriorSpec

Pictures = Any
"""A path, a PIL image, or a sequence of them."""

Images = npt.ArrayLike | Pictures
"""What ``encode`` takes: arrays or pictures."""


class Codec:
    """Turns images into indices and back, with the graphs of a bundle.

        codec = Codec.load("model-onnx")
        indices = codec.encode(images)           # int64 (N, S)
        indices = codec.encode(["a.png", "b.jpg"])
        reconstructions = codec.decode(indices)  # float32 (N, C, H, W) in [0, 1]

    spec       the model: image_shape (C, H, W), latent_shape and its product latent_size S,
               num_codes K, code_size D, likelihood
    preprocessing    how pictures are prepared: as they were for training
    manifest_sha256  the digest of the bundle's manifest, which identifies the bundle
    device     the chosen device, "cpu" or "cuda"; "custom" if ``load`` was given providers
    providers  onnxruntime's execution providers, the preferred one first

    Images are arrays or pictures. Arrays must have the shape and range that ``encode`` lists.
    A picture is a path or a PIL image; a sequence of pictures is a batch. ``prepare`` says how
    pictures are prepared.

    Several threads may call the methods at once. Large inputs are processed a few images at a time,
    so that memory stays flat. A Codec is a context manager. It can be pickled for worker processes,
    which open their own sessions.
    """

    def __init__(
        self, bundle: Bundle, graphs: Mapping[str, bytes], device: str, runtime: Runtime
    ) -> None:
        self.spec, self.preprocessing = bundle.spec, bundle.preprocessing
        self.manifest_sha256 = bundle.sha256
        sessions, self.device = open_sessions(
            graphs, bundle.spec, device, batch=bundle.batch, runtime=runtime
        )
        self.providers = sessions["tokenizer"].providers
        self._sessions: dict[str, Session] | None = sessions
        self._opening = Lock()
        self._made_from = (bundle, dict(graphs), device, runtime)

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
        """Reads a bundle, checks its files against their digests, and opens it on a device.

        device: "cpu", "cuda" or "auto". "auto" takes CUDA if a GPU can be used.
        providers: onnxruntime's execution providers, used instead of ``device``. The first one
        must be usable.
        session_options: an onnxruntime.SessionOptions. intra_op_num_threads: threads per
        operator. manifest_sha256: the digest that the bundle's manifest must have, as ``export``
        and ``verify`` print it.
        Raises InputError (a ValueError) if the bundle is damaged or is not the one asked for,
        MachineError if "cuda" or the first provider cannot be used, ValueError for any other
        device.
        """
        found = Bundle.open(bundle, manifest_sha256)
        graphs = {stage: found.graph(stage) for stage in ("tokenizer", "detokenizer")}
        runtime = Runtime(providers, session_options, intra_op_num_threads)
        return cls(replace(found, path=found.path.absolute()), graphs, device, runtime)

    def __repr__(self) -> str:
        spec, grid = self.spec, "x".join(map(str, self.spec.latent_shape))
        model = f"{spec.family}: images {spec.image_shape}, {grid} tokens of {spec.num_codes}"
        closed = ", closed" if self._sessions is None else ""
        return (
            f"<Codec {plain(model)}, on {self.device}, bundle {self.manifest_sha256[:12]}{closed}>"
        )

    def __enter__(self) -> Codec:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases onnxruntime's sessions. Later calls raise ValueError."""
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
        return self._all(stage, array)[0]

    def _all(self, stage: str, *arrays: Array) -> list[Array]:
        sessions = self._sessions
        if sessions is None:
            raise ValueError("the Codec was closed")
        if stage not in sessions:
            self._open(stage, sessions)
        return sessions[stage](*arrays)

    def _open(self, stage: str, sessions: dict[str, Session]) -> None:
        """Opens a graph that ``load`` left closed, on the same device as the others.

        Raises what ``load`` raises.
        """
        bundle, _, _, runtime = self._made_from
        device = "auto" if self.device == "custom" else self.device
        with self._opening:
            if stage not in sessions:
                graphs = {stage: bundle.graph(stage)}
                spec = bundle.prior if stage in PRIOR_STAGES else bundle.spec
                assert spec is not None
                opened = open_sessions(graphs, spec, device, batch=bundle.batch, runtime=runtime)
                sessions.update(opened[0])

    def _batch(self, images: Images) -> npt.NDArray[np.float32]:
        """Returns arrays or pictures as (N, C, H, W) float32 in [0, 1]. Raises InputError."""
        if not isinstance(images, np.ndarray):
            from vqref.host.pictures import is_picture

            some = images[:1] if isinstance(images, list | tuple) else [images]
            if any(map(is_picture, some)):
                images = self.prepare(images)
        return as_batch(images, self.spec.image_shape)

    def prepare(self, pictures: Pictures) -> npt.NDArray[np.uint8]:
        """Returns pictures as ``encode`` sees them: uint8 (N, C, H, W).

        pictures: a path, a PIL image, or a sequence of these. A single picture is a batch of one.

        Each picture is rotated as its EXIF data say, converted to grey or colour, put on a
        background if it is transparent, and resized. ``preprocessing`` sets the details.

        Raises InputError (a ValueError) that names the picture, MachineError if Pillow is not
        installed.
        """
        from vqref.host.pictures import prepare

        return prepare(pictures, self.spec.image_shape, self.preprocessing)

    def encode(self, images: Images) -> npt.NDArray[np.int64]:
        """Returns the indices (N, S) of N images, int64 from 0 to num_codes - 1.

        images: pictures, or an array of uint8, or of floating numbers in [0, 1]. The array's shape
        is (N, C, H, W), (N, H, W, C), or (N, H, W) if C is 1. Without N it is one image, a batch of
        one.

        Raises InputError (a ValueError) for any other shape, dtype or range and for values that
        are not finite, and what ``prepare`` raises.
        """
        return self._run("tokenizer", self._batch(images))

    def latents(self, images: Images) -> npt.NDArray[np.float32]:
        """Returns the encoder's output for N images, before the quantizer: float32 (N, S, D).

        The first call opens another graph of the bundle. images: as for ``encode``. Raises what
        ``encode`` and ``load`` raise.
        """
        return self._run("encoder", self._batch(images))

    @cached_property
    def codebook(self) -> npt.NDArray[np.float32]:
        """The codes, float32 (K, D), read-only. Row k is the code of index k.

        The first access reads the bundle's oracle file. Raises InputError (a ValueError) if that
        file is damaged.
        """
        codes = self._made_from[0].oracle().params[CODEBOOK].copy()
        codes.setflags(write=False)
        return codes

    def decode(self, indices: npt.ArrayLike, *, uint8: bool = False) -> Array:
        """Returns reconstructions (N, C, H, W), float32 in [0, 1], of indices (N, S).

        uint8: return the nearest of 256 levels instead, np.rint(255 * x), which rounds halves to
        even. Raises ValueError for any other shape or dtype, and for an index outside 0 to
        num_codes - 1.
        """
        shape = ("N", self.spec.latent_size)
        found = self._run("detokenizer", as_indices(indices, shape, self.spec.num_codes))
        return np.rint(255 * found).astype(np.uint8) if uint8 else found

    def reconstruct(self, images: Images, *, uint8: bool = False) -> Array:
        """Returns ``decode(encode(images), uint8=uint8)``."""
        return self.decode(self.encode(images), uint8=uint8)

    @overload
    def sample(
        self,
        n: int,
        *,
        seed: int | np.random.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        certify: Literal[False] = False,
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def sample(
        self,
        n: int,
        *,
        seed: int | np.random.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        certify: Literal[True],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]: ...

    def sample(
        self,
        n: int,
        *,
        seed: int | np.random.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        certify: bool = False,
    ) -> Any:
        """Draws indices from the bundle's prior and returns their reconstructions (n, C, H, W).

        A bundle without a learned prior uses the uniform prior.

        seed: an integer of at least 0, or None for a new draw each time. The uniform prior also
        takes a generator to draw from. A sample of a learned prior depends only on seed,
        temperature, top_k and the sample's own number.
        temperature, top_k: only for a learned prior, see ``vqref.prior.choose``.
        certify: only for a learned prior. Also return which images (n,) are certified: no error
        within the tolerance of the graphs changes any of their tokens, so every machine draws the
        same.
        Raises TypeError or ValueError for anything else.
        """
        if self.prior is None:
            if certify or top_k is not None or temperature != 1.0:
                raise ValueError("temperature, top_k and certify need a bundle with a prior")
            rng = _generator(seed)
            size = (_whole("n", n), self.spec.latent_size)
            return self.decode(rng.integers(self.spec.num_codes, size=size))
        drawn = self.draw(n, seed=seed, temperature=temperature, top_k=top_k)
        images = self.decode(drawn.indices)
        return (images, drawn.certified.all(axis=1)) if certify else images

    def draw(
        self,
        n: int,
        *,
        seed: int | np.random.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Drawn:
        """Draws indices (n, S) from a learned prior, and says which are certified (n, S).

        A token is certified given the tokens before it, see ``sample``. The first call opens
        another graph of the bundle. Raises what ``sample`` raises.
        """
        from vqdeploy.sampling import draw

        prior, count = self._prior(), _whole("n", n)
        if isinstance(seed, np.random.Generator):
            raise TypeError("seed is a generator; a learned prior takes an integer or None")
        number = int(np.random.SeedSequence().entropy) if seed is None else _whole("seed", seed)  # type: ignore[arg-type]
        step = partial(self._all, "prior_step")
        return draw(step, prior, number, count, temperature, top_k)

    def log_likelihood(self, indices: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Returns log p (N,) of indices (N, S) under the learned prior, in nats.

        Raises ValueError for any other shape or dtype, an index outside 0 to num_codes - 1, and a
        bundle without a prior.
        """
        prior = self._prior()
        rows = as_indices(indices, ("N", prior.latent_size), prior.num_codes)
        found = self._all("prior", rows)[0]
        taken = np.take_along_axis(found, rows[..., None], axis=2)[..., 0]
        total: npt.NDArray[np.float64] = taken.sum(axis=1, dtype=np.float64)
        return total

    @property
    def prior(self) -> PriorSpec | None:
        """The specification of the learned prior, or None if the bundle has none."""
        return self._made_from[0].prior

    def _prior(self) -> PriorSpec:
        """Returns the prior's specification. Raises ValueError if there is none."""
        prior = self.prior
        if prior is None:
            raise ValueError("the bundle has no learned prior: vqtrain prior learns one")
        return prior


def _generator(seed: Any) -> np.random.Generator:
    """Returns the given generator, or a new one for a seed. Raises TypeError, ValueError."""
    if isinstance(seed, np.random.Generator):
        return seed
    expected = "an integer from 0 on, a numpy.random.Generator or None"
    return np.random.default_rng(None if seed is None else _whole("seed", seed, expected))


def _whole(name: str, value: Any, expected: str = "an integer from 0 on") -> int:
    """Returns the value as an integer of at least 0. Raises TypeError, ValueError."""
    try:
        found = -1 if isinstance(value, bool | np.bool_) else index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r:.80}, expected {expected}") from None
    if found < 0:
        raise ValueError(f"{name} is {value!r:.80}, expected {expected}")
    return found
