"""What ``python -m vqtrain`` does once its options are parsed: images, a run folder, a Trainer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from vqref.commandline import InputError, MachineError, UsageError
from vqref.files import require_writable
from vqref.images import OFFICIAL_NAMES
from vqref.spec import ModelSpec
from vqtrain.interrupts import Interrupts
from vqtrain.memory import keep_freed_memory
from vqtrain.options import RECIPES, TrainingOptions
from vqtrain.runs import RunFolder, differences, latest_state, require_same_course
from vqtrain.sources import load_source
from vqtrain.state import list_states, load_state
from vqtrain.train import Trainer, Work, require_one_batch, say

Options = TypeVar("Options", TrainingOptions, ModelSpec)
State = dict[str, Any]


def train_command(arguments: argparse.Namespace) -> None:
    """Trains as the options say. Raises CommandError, and Interrupted where a signal came."""
    device = choose_device(arguments.device)
    if getattr(arguments, "precision", None) == "auto":
        arguments.precision = choose_precision(device)
        say(f"precision {arguments.precision}: what this {'card' if device.type == 'cuda' else 'processor'} multiplies fastest")
    if device.type == "cpu":
        if getattr(arguments, "precision", None) == "tf32":
            raise UsageError("--precision tf32: only a CUDA device has it; use float32, bfloat16 or auto")
        keep_freed_memory()
    options = _build(RECIPES[arguments.recipe], arguments)
    sizes = _build(ModelSpec(), arguments)
    require_writable(arguments.output)
    if arguments.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    with Interrupts() as interrupts:
        images = load_source(arguments.data, say, parse_size(arguments))
        try:
            spec = dataclasses.replace(sizes, image_shape=images.train.shape[1:])
        except ValueError as error:
            raise InputError(f"{images.source}: {error}") from None
        require_one_batch(images, options)
        provenance = {
            "data": {"source": images.source, "sha256": images.sha256, "images": len(images.train)},
            "recipe": arguments.recipe,
            "seed": options.seed,
            "device": str(device),
            "versions": _versions(),
        }
        course = {**options.to_dict(), **spec.to_dict(), "data_sha256": images.sha256}
        default_name = f"{_short_name(images.source)}-{arguments.recipe}"
        folder, state = open_run(arguments, default_name, course)
        try:
            folder.write_options(_resolved(arguments, options, spec))
            writer = _writer(folder) if arguments.tensorboard else None
            work = Work(device, folder, arguments.output, interrupts, arguments.checkpoint_steps, writer=writer)
            model = Trainer(spec, options, images, work, provenance, state).run()
        finally:
            folder.release()
    print(f"wrote {arguments.output}; pictures and metrics are in {folder.path}")
    print(f"next: python -m vqdeploy export {arguments.output}")
    if arguments.json:
        print(json.dumps({k: v for k, v in model.metrics.items() if k not in ("history", "oracle")}))


def open_run(arguments: argparse.Namespace, default_name: str, course: dict[str, Any]) -> tuple[RunFolder, State | None]:
    """The run's folder, held, and the checkpoint to go on from, if any, as ``--resume`` and ``--name`` say.

    Raises UsageError where a checkpoint was made under other options, InputError where a folder cannot be gone on with,
    MachineError where another process holds it.
    """
    if arguments.resume not in ("auto", "never"):
        return _resume_from(Path(arguments.resume), course)
    if hasattr(arguments, "name"):
        path = arguments.runs / arguments.name
        if arguments.resume == "never" and path.exists():
            raise InputError(f"{path}: exists already; use another --name")
        folder = RunFolder(path)
        return folder, _go_on(folder, course, named=True)
    taken = _numbered(arguments.runs, default_name)
    if taken and arguments.resume == "auto":
        with suppress(MachineError):  # held by another process: then this is another run
            folder = RunFolder(taken[-1])
            state = _go_on(folder, course, named=False)
            if state is not None:
                return folder, state
            folder.release()
    name = default_name if not taken else f"{default_name}-{len(taken) + 1}"
    return RunFolder(arguments.runs / name), None


def _resume_from(path: Path, course: dict[str, Any]) -> tuple[RunFolder, State]:
    """An explicit checkpoint, or the last one of an explicit run: it is this one or an error."""
    if path.is_dir():
        states = list_states(path / "checkpoints")
        if not states:
            raise InputError(f"{path}: holds no checkpoints")
        path = states[0]
    state = load_state(path)
    run = path.parent.parent
    require_same_course(run, course, state)
    folder = RunFolder(run)
    print(f"going on from {path}")
    return folder, state


def _go_on(folder: RunFolder, course: dict[str, Any], *, named: bool) -> State | None:
    """The state of a run that is not finished and has the same course; None to begin (a named run is held to it)."""
    found = latest_state(folder.path)
    if found is None:
        return None
    state, path, complaints = found
    for complaint in complaints:
        print(f"passed over: {complaint}")
    if named:
        require_same_course(folder.path, course, state)
        if state["finished"]:
            raise InputError(f"{folder.path}: is finished; use another --name")
    elif differences(course, state["course"]) or state["finished"]:
        return None
    print(f"going on from {path}")
    return state


def _short_name(source: str) -> str:
    """What a run on these images is called: kmnist, glyphs, or the name of the file without its ending."""
    official = any(source == train for train, _ in OFFICIAL_NAMES)
    return "kmnist" if official else Path(source).stem.split(" ")[0]


def _numbered(runs: Path, name: str) -> list[Path]:
    """NAME, NAME-2, NAME-3, … as far as they exist."""
    found: list[Path] = []
    while (path := runs / (f"{name}-{len(found) + 1}" if found else name)).exists():
        found.append(path)
    return found


def choose_device(name: str) -> torch.device:
    """The device of ``--device``. Raises MachineError for "cuda" where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(device: torch.device) -> str:
    """What ``--precision auto`` means: bfloat16 where the device has instructions for it, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = any(bool(getattr(torch.cpu, name, bool)()) for name in known)
    return "bfloat16" if found else "float32"


def parse_size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """``--resize HxW`` as (H, W). Raises UsageError."""
    if not hasattr(arguments, "resize"):
        return None
    try:
        height, width = (int(n) for n in arguments.resize.split("x"))
    except ValueError:
        raise UsageError(f"--resize is {arguments.resize!r}; it must be like 28x28") from None
    return height, width


def _build(defaults: Options, arguments: argparse.Namespace) -> Options:
    names = {field.name for field in dataclasses.fields(defaults)}
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in names}
    try:
        return dataclasses.replace(defaults, **given)
    except ValueError as error:
        raise UsageError(str(error).replace("_", "-")) from None


def _resolved(arguments: argparse.Namespace, options: TrainingOptions, spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """What ``--config`` needs to begin the same run: paths as given, the recipe's options spelt out."""
    names = ("data", "resize", "recipe", "device", "deterministic", "output", "runs", "checkpoint_steps", "tensorboard")
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    sizes = {name: value for name, value in spec.to_dict().items() if name != "image_shape"}  # follows from the images
    return {
        "run": {name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "training": options.to_dict(),
        "model": sizes,
    }


def _writer(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError("--tensorboard: not installed; pip install 'portable-vqvae[tensorboard]'") from None
    return SummaryWriter(folder.path / "tensorboard")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("portable-vqvae", "numpy", "torch")}
