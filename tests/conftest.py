"""Small models and images that every test shares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vqref
from vqref.checkpoint import Model
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


class Golden:
    """One golden file: ``spec``, ``params`` and the arrays by key."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        latent_size, num_codes, code_size, base_depth = (int(n) for n in self.arrays["spec"])
        self.spec = vqref.ModelSpec((1, 28, 28), base_depth, latent_size, num_codes, code_size)
        self.params = {p.name: self.arrays[f"param/{p.name}"] for p in self.spec.parameters}

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]


@pytest.fixture(scope="session", params=["step_latent1", "step_latent4"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / f"{request.param}.npz")


@pytest.fixture(scope="session")
def real_images() -> np.ndarray:
    """The 16 genuine KMNIST images of a golden file, (16, 1, 28, 28) float32 in [0, 1]."""
    return Golden(GOLDEN / "step_latent1.npz")["images"].astype(np.float32)


@pytest.fixture(scope="session")
def many_images(real_images: np.ndarray) -> np.ndarray:
    """1,000 different images (uint8, 28x28) made from the genuine ones: shifted, mirrored, inverted, dimmed."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(1000):
        image = np.roll(real_images[i % 16, 0], rng.integers(-4, 5, 2), axis=(0, 1))
        image = image[:, ::-1] if rng.random() < 0.5 else image
        image = 1 - image if rng.random() < 0.1 else image
        out.append(image * rng.uniform(0.5, 1))
    return np.round(255 * np.stack(out)).astype(np.uint8)


@pytest.fixture(scope="session")
def model() -> Model:
    """A small model whose codebook lies among its latents, so that every code is near something: four latents of 16."""
    return small_model(vqref.ModelSpec((1, 28, 28), base_depth=4, latent_size=4, num_codes=16, code_size=8))


def small_model(spec: vqref.ModelSpec, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    params = vqref.init_params(spec, rng)
    for name, array in params.items():
        if name.endswith(".bias"):
            params[name] = rng.normal(0, 0.1, array.shape).astype(np.float32)
    latents = vqref.encode(spec, params, rng.random((64, *spec.image_shape)))
    rows = rng.choice(latents.reshape(-1, spec.code_size), spec.num_codes)
    params[CODEBOOK] = (rows + rng.normal(0, 0.05, rows.shape)).astype(np.float32)
    params[EMA_COUNT] = rng.uniform(0, 4, spec.num_codes).astype(np.float32)
    params[EMA_MEANS] = params[CODEBOOK] * params[EMA_COUNT][:, None]
    return Model(spec, params, {"epochs": 1}, {}, {"data": {"source": "test", "sha256": "0" * 64, "images": 1}})


@pytest.fixture(scope="session")
def model_file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as a model.pt."""
    from vqtrain.checkpoint import write_model

    path = tmp_path_factory.mktemp("model") / "model.pt"
    write_model(path, model)
    return path


@pytest.fixture(scope="session")
def bundle(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as a bundle."""
    from vqdeploy.export import export

    path = tmp_path_factory.mktemp("bundle") / "model-onnx"
    export(model_file, path)
    return path


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs ``python -m ...`` in an empty folder, as a user would; warnings of ours are errors there too."""

    def python(*arguments: object, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:vq", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return python


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Runs a command that must fail with ``code`` and one line on stderr; returns the line."""

    def expect(code: int, *arguments: object, **options: object) -> str:
        done = run(*arguments, **options)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    return expect
