"""Fixtures for all tests: small models, images, and ways to run commands."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Networks are small. With other tests running, more threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")

import forks
import numpy as np
import pytest
from support import GOLDEN, Golden, small_model

from vqref import families
from vqref.modelfile import Model


@pytest.fixture(scope="session", params=["step_latent1", "step_latent4"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / f"{request.param}.npz")


@pytest.fixture(scope="session")
def real_images() -> np.ndarray:
    """The 16 genuine KMNIST images of a golden file, (16, 1, 28, 28) float32 in [0, 1]."""
    return Golden(GOLDEN / "step_latent1.npz")["images"].astype(np.float32)


@pytest.fixture(scope="session")
def many_images(real_images: np.ndarray) -> np.ndarray:
    """1,000 different images (1000, 28, 28) uint8: the genuine ones shifted, mirrored, dimmed."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(1000):
        image = np.roll(real_images[i % 16, 0], rng.integers(-4, 5, 2), axis=(0, 1))
        image = image[:, ::-1] if rng.random() < 0.5 else image
        image = 1 - image if rng.random() < 0.1 else image
        out.append(image * rng.uniform(0.5, 1))
    return np.round(255 * np.stack(out)).astype(np.uint8)


@pytest.fixture(scope="session")
def colour_images(many_images: np.ndarray) -> np.ndarray:
    """Colour images (300, 3, 16, 16) uint8; each channel is one of ``many_images``, cropped."""
    return np.ascontiguousarray(many_images[:900, 6:22, 6:22].reshape(300, 3, 16, 16))


@pytest.fixture(scope="session")
def model() -> Model:
    """A small model of family post: four latents of 16 codes."""
    return small_model(
        families.post((1, 28, 28), base_depth=4, latent_size=4, num_codes=16, code_size=8)
    )


@pytest.fixture(scope="session")
def residual_model() -> Model:
    """A small model of family residual: a 4x4 grid of 32 codes on colour images."""
    sizes: dict[str, Any] = {
        "hidden": 16,
        "blocks": 1,
        "block_hidden": 8,
        "num_codes": 32,
        "code_size": 8,
    }
    return small_model(families.residual((3, 16, 16), **sizes, variance=0.08))


@pytest.fixture(scope="session")
def model_file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as a model.pt."""
    return _written(model, tmp_path_factory)


@pytest.fixture(scope="session")
def residual_file(residual_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``residual_model`` as a model.pt."""
    return _written(residual_model, tmp_path_factory)


def _written(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vqtrain.modelfile import write_model

    path = tmp_path_factory.mktemp("model") / "model.pt"
    write_model(path, model)
    return path


@pytest.fixture(scope="session")
def bundle(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` as a bundle."""
    return _exported(model_file, tmp_path_factory)


@pytest.fixture(scope="session")
def residual_bundle(residual_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``residual_model`` as a bundle."""
    return _exported(residual_file, tmp_path_factory)


def _exported(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vqdeploy.export import export

    path = tmp_path_factory.mktemp("bundle") / "model-onnx"
    export(model_file, path)
    return path


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def server() -> Iterator[forks.Server]:
    """The server that forks a process for each command."""
    started = forks.Server()
    yield started
    started.close()


@pytest.fixture
def run(tmp_path: Path, server: forks.Server) -> Run:
    """Runs ``python ...`` in an empty folder, as a user would.

    Our own warnings are errors there, too. ``-m`` and ``-c`` run in a fork. A file, or a command
    with an environment of its own, runs in a new process.
    """

    def python(
        *arguments: object, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        usual = not environment and forks.environment() == server.environment
        if usual and words[0] in ("-m", "-c"):
            return server.run(words, cwd)
        return subprocess.run(
            [sys.executable, *forks.OPTIONS, *words],
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


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as started:
        # its sandbox needs rights that containers do not have; the pages are our own
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def barriers() -> Callable[[Any], list[tuple[str, str]]]:
    """Looks for barriers in a page with axe-core; returns the broken rules and their impact.

    The page's context must have ``bypass_csp``, since axe-core is not a script of the page.
    """
    pytest.importorskip("axe_playwright_python", reason="needs axe-core, of the extra test")
    source = importlib.resources.files("axe_playwright_python") / "axe.min.js"

    def look(page: Any) -> list[tuple[str, str]]:
        page.evaluate(source.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10  # it looked
        return [(one["id"], one["impact"]) for one in found["violations"]]

    return look
