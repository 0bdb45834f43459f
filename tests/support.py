"""What tests share besides the fixtures of ``conftest.py``: models, runs, forgeries."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vqref
from vqref import families
from vqref.modelfile import Model
from vqref.prior import PriorSpec
from vqref.quantizer import grid
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS, KINDS, Layer, ModelSpec

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

CPU = torch.device("cpu")
SPEC = families.post((1, 28, 28), base_depth=4, latent_size=2, num_codes=8, code_size=4)
"""The network that ``trainer`` trains."""


RESIDUAL: dict[str, Any] = {
    "hidden": 8,
    "blocks": 1,
    "block_hidden": 4,
    "num_codes": 32,
    "code_size": 8,
}
"""Sizes of a small residual network."""

VQGAN: dict[str, Any] = {
    "channels": 4,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (8,),
    "groups": 2,
    "latent_channels": 6,
    "num_codes": 16,
    "code_size": 4,
}
"""Sizes of a small vqgan: attention in its second level, for images 16 pixels high."""

ROWS = {
    "affine": Layer("x.y", "affine", (2, 3), (2, 3), scale=-1.5, shift=0.25),
    "conv": Layer(
        "x.y", "conv", (2, 5, 6), (3, 3, 2), kernel=(3, 4), stride=2, pads=((1, 2), (0, 1))
    ),
    "conv_transpose": Layer(
        "x.y",
        "conv_transpose",
        (2, 3, 4),
        (3, 6, 8),
        kernel=(5, 4),
        stride=2,
        pads=((1, 2), (2, 0)),
    ),
    "dense": Layer("x.y", "dense", (5,), (4,)),
    "reshape": Layer("x.y", "reshape", (2, 3, 4), (8, 3)),
    "to_vectors": Layer("x.y", "to_vectors", (6, 2, 3), (12, 3)),
    "to_grid": Layer("x.y", "to_grid", (12, 3), (6, 2, 3)),
    "add": Layer("x.y", "add", (2, 3), (2, 3), ("x.a", "x.b")),
    "activation": Layer("x.y", "activation", (2, 3), (2, 3)),
    "embedding": Layer("x.y", "embedding", (4,), (4, 3), num_codes=5),
    "layer_norm": Layer("x.y", "layer_norm", (4, 3), (4, 3)),
    "group_norm": Layer("x.y", "group_norm", (6, 2, 3), (6, 2, 3), groups=3),
    "unit_norm": Layer("x.y", "unit_norm", (4, 3), (4, 3)),
    "bounded": Layer("x.y", "bounded", (4, 3), (4, 3), levels=(8, 5, 3)),
    "upsample": Layer("x.y", "upsample", (2, 3, 4), (2, 6, 8)),
    "attention": Layer(
        "x.y", "attention", (5, 6), (5, 6), ("x.a", "x.b", "x.c"), heads=2, causal=True
    ),
}
ROWS["attention that is not causal"] = dataclasses.replace(ROWS["attention"], causal=False)
"""A row of each kind, whose sizes all differ."""


def inputs_of(row: Layer, rng: np.random.Generator, count: int = 3) -> list[np.ndarray]:
    """Returns the inputs of a row, ``count`` of each: numbers, or indices."""
    if row.kind == "embedding":
        return [rng.integers(0, row.num_codes, (count, *row.in_shape))]
    return [rng.normal(size=(count, *row.in_shape)) for _ in range(KINDS[row.kind].inputs)]


def unit(x: np.ndarray) -> np.ndarray:
    """Returns vectors (…, D) divided by their lengths."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Golden:
    """One golden file of family post: ``spec``, ``params`` and the arrays by key."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        latent_size, num_codes, code_size, base_depth = (int(n) for n in self.arrays["spec"])
        self.spec = families.post((1, 28, 28), base_depth, latent_size, num_codes, code_size)
        self.params = {p.name: self.arrays[f"param/{p.name}"] for p in self.spec.parameters}

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


def small_model(spec: ModelSpec, seed: int = 0) -> Model:
    """Returns a model of random parameters, with codes near its latents so that none is far off."""
    rng = np.random.default_rng(seed)
    params = vqref.init_params(spec, rng)
    for name, array in params.items():
        if name.endswith(".bias"):
            params[name] = rng.normal(0, 0.1, array.shape).astype(np.float32)
    latents = vqref.encode(spec, params, rng.random((64, *spec.image_shape)))
    rows = rng.choice(latents.reshape(-1, spec.code_size), spec.num_codes)
    params[CODEBOOK] = (rows + rng.normal(0, 0.05, rows.shape)).astype(np.float32)
    if spec.levels:  # untrained latents are all near 0, the middle of the grid
        last = next(row for row in reversed(spec.encoder) if row.parameters)
        params[f"{last.name}.weight"] *= 20
        params[CODEBOOK] = grid(spec.levels).astype(np.float32)
    if spec.normalized:
        lengths = np.linalg.norm(params[CODEBOOK].astype(np.float64), axis=1, keepdims=True)
        params[CODEBOOK] = (params[CODEBOOK] / lengths).astype(np.float32)
    params[EMA_COUNT] = rng.uniform(0, 4, spec.num_codes).astype(np.float32)
    params[EMA_MEANS] = params[CODEBOOK] * params[EMA_COUNT][:, None]
    data = {"source": "test", "sha256": "0" * 64, "images": 1}
    return Model(spec, params, {"epochs": 1}, {}, {"data": data})


def prior_params(spec: PriorSpec, seed: int = 0, scale: float = 20.0) -> dict[str, np.ndarray]:
    """Returns the parameters of an untrained prior, with weights large enough to matter."""
    found = vqref.init_params(spec, np.random.default_rng(seed))
    return {
        name: array if "norm" in name else (scale * array).astype(np.float32)
        for name, array in found.items()
    }


def trainer(
    tmp_path: Path,
    images: np.ndarray,
    said: list[str] | None = None,
    *,
    device: torch.device = CPU,
    state: dict[str, Any] | None = None,
    spec: ModelSpec = SPEC,
    held_out: int = 40,
    work: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Returns a ``Trainer`` on 160 of images (N, H, W) or (N, C, H, W): two epochs of five steps.

    said: takes its lines. held_out: how many of the next images are held out. work, options:
    changes to ``Work`` and to the post's options. Nothing is drawn unless ``work`` says so.
    """
    from vqref.host.images import ImageSet
    from vqtrain import Trainer, TrainingOptions
    from vqtrain.run.folder import RunFolder
    from vqtrain.run.snapshot import course_of
    from vqtrain.run.trainer import Work

    images = images[:, None] if images.ndim == 3 else images
    kept = images[160 : 160 + held_out] if held_out else None
    source = ImageSet(images[:160], kept, "test.npz", "0" * 64)
    chosen = dataclasses.replace(TrainingOptions(epochs=2, batch_size=32), **options)
    say = (lambda line: None) if said is None else said.append
    folder, output = RunFolder(tmp_path / "run"), tmp_path / "model.pt"
    place = Work(device, folder, output, **{"say": say, "pictures": False, **(work or {})})
    course = course_of(spec, chosen, {}, source.sha256)
    return Trainer(spec, chosen, source, place, {"data": {"source": "test.npz"}}, course, state)


def stop_in_step(monkeypatch, when: int) -> None:
    """Makes later runs get SIGTERM in step ``when``, counted from 1."""
    import vqtrain.run.step
    import vqtrain.run.trainer

    step, taken = vqtrain.run.step.training_step, list[int]()

    def interrupting(*arguments):
        taken.append(1)
        if len(taken) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(vqtrain.run.trainer, "training_step", interrupting)


class Trap:
    """An object that creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def sign(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Makes the manifest of a bundle fit its files again, and seals it, as a forger would.

    change: changes the manifest before it is sealed.
    """
    from vqdeploy.bundle import describe_files
    from vqdeploy.sealed import sealed

    manifest = json.loads((folder / "manifest.json").read_text())
    names = manifest["files"]
    manifest["files"] = describe_files({name: (folder / name).read_bytes() for name in names})
    change(manifest)
    manifest.pop("sha256", None)
    (folder / "manifest.json").write_bytes(sealed(manifest))


def weight_changed(
    folder: Path, graph: str, initializer: str, change: Callable[[np.ndarray], None]
) -> None:
    """Changes an array of a graph of a bundle in place."""
    import onnx

    path = folder / f"{graph}.onnx"
    found = onnx.load(path)
    tensor = next(t for t in found.graph.initializer if t.name == initializer)
    array = onnx.numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, initializer))
    path.write_bytes(found.SerializeToString())


def add(index: Any, value: float) -> Callable[[np.ndarray], None]:
    """Returns a change that adds ``value`` to one element."""

    def change(array: np.ndarray) -> None:
        array[index] += value

    return change


def png(image: np.ndarray) -> bytes:
    """Returns a PNG of an image (3, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar that is being written."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
