"""``vqtrain.train``: makes the command's model from an array, and leaves the process as it was."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT

import vqtrain
from vqref.errors import InputError, MachineError, UsageError
from vqref.host.images import ImageSet
from vqtrain.__main__ import build_parser, parse_with_config
from vqtrain.data.holdout import split
from vqtrain.device import choose_precision
from vqtrain.modelfile import read_model
from vqtrain.run.folder import latest_state
from vqtrain.training import OPTIONS, build_spec, make_plan

SMALL: dict[str, Any] = {
    "epochs": 1,
    "base_depth": 2,
    "num_codes": 8,
    "batch_size": 32,
    "check_images": 4,
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Puts temporary folders into ``tmp_path / "temporary"``; paths are relative to tmp_path."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(many_images):
    return many_images[:96]


def as_words(options):
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", value]
    return words


def figures(model):
    """Returns the metrics without the seconds that they took, and the name of the data."""
    history = [dict(line) for line in model.metrics["history"]]
    for line in history:
        del line["images_per_second"], line["data"]
    return history


SAME = {
    "defaults": {"epochs": 1, "check_images": 2},
    "others": {
        **SMALL,
        "network": "residual",
        "base_depth": None,
        "hidden": 8,
        "blocks": 1,
        "block_hidden": 4,
        "likelihood": "logistic",
        "recipe": "sonnet",
        "seed": 3,
        "center": False,
        "held_out": 0.25,
        "precision": "float32",
    },
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_the_model_is_the_commands_bit_for_bit(run, place, images, options):
    options = {name: value for name, value in options.items() if value is not None}
    np.save("x.npy", images)
    done = run("-m", "vqtrain", "--data", "x.npy", *as_words(options))
    assert done.returncode == 0, done.stderr
    expected, found = read_model(place / "model.pt"), vqtrain.train(images, **options)
    assert (found.spec, found.training) == (expected.spec, expected.training)
    for name, array in expected.params.items():
        np.testing.assert_array_equal(found.params[name], array)
    assert figures(found) == figures(expected)
    of_data = {
        key: {k: v for k, v in model.provenance["data"].items() if k not in ("source", "sha256")}
        for key, model in (("found", found), ("expected", expected))
    }
    assert of_data["found"] == of_data["expected"]


def test_it_is_silent_and_leaves_nothing(place, images, capfd):
    model = vqtrain.train(images, **SMALL)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in place.iterdir()] == ["temporary"]
    assert not [*(place / "temporary").glob("vqtrain-*")]  # PyTorch keeps a folder there
    assert model.metrics["held_out"]["bound"] > 0
    data = model.provenance["data"]
    out = int(split(images[:, None], 0.1).sum())
    assert (data["source"], data["images"]) == ("an array", 96 - out)
    assert data["held_out"] == {"fraction": 0.1, "images": out}


def on_a_terminal(code: str, cwd) -> str:
    """Returns what a program writes to a terminal."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while piece := os.read(ours, 2**16):
            said += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, said
    return said.decode()


BAR = """
import numpy as np
import vqtrain.training
images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
options = {"epochs": 1, "base_depth": 2, "num_codes": 8, "batch_size": 32, "check_images": 4}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_it_draws_no_bar_on_a_terminal(place):
    assert on_a_terminal(BAR + "vqtrain.train(images, **options)", place) == ""
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8))
    words = ["--data=x.npy", "--epochs=1", "--base-depth=2", "--num-codes=8", "--batch-size=32"]
    command = f"from vqtrain.__main__ import main; main({words})"
    assert "epoch 1/1" in on_a_terminal(command, place)


def test_lines_go_where_they_are_wanted(images):
    said: list[str] = []
    vqtrain.train(images, **SMALL, say=said.append)
    count = int(split(images[:, None], 0.1).sum())
    assert said[:2] == [
        f"{96 - count} images train, {count} are held out (a tenth, by hash)",
        "network post: 1x28x28 images, 1 latent, 8 codes, bernoulli",
    ]
    assert said[-1].startswith("oracle: agrees on 4 images, model.pt read back")


def test_every_layout_of_the_same_images_is_the_same_model(images):
    first = vqtrain.train(images, **SMALL)
    for form in (images[:, None], images[..., None]):
        again = vqtrain.train(form, **SMALL)
        assert again.provenance["data"] == first.provenance["data"]
        np.testing.assert_array_equal(
            again.params["encoder.conv1.weight"], first.params["encoder.conv1.weight"]
        )


def test_colour_in_the_last_axis_floats_and_arrays_that_cannot_be_written_train(colour_images):
    options = {**SMALL, "hidden": 8, "blocks": 1, "block_hidden": 4}
    del options["base_depth"]
    images = (colour_images[:64].transpose(0, 2, 3, 1) / 255).astype(np.float64)
    images.setflags(write=False)
    before = images.copy()
    model = vqtrain.train(images, **options, held_out=0)
    assert model.spec.image_shape == (3, 16, 16)
    assert "held_out" not in model.metrics
    np.testing.assert_array_equal(images, before)
    frozen = np.array(colour_images[:64])
    frozen.setflags(write=False)
    vqtrain.train(frozen, **options, held_out=0)


REFUSED: dict[str, Any] = {
    "ambiguous": (np.zeros((64, 3, 8, 4), np.uint8), "could be"),
    "flat": (np.zeros((64, 784), np.uint8), "expected"),
    "integers": (np.zeros((64, 8, 8), np.int64), "dtype is int64"),
    "range": (np.full((64, 8, 8), 255.0), "values from 255 to 255"),
    "NaN": (np.full((64, 8, 8), np.nan), "nan at"),
    "few": (np.zeros((20, 8, 8), np.uint8), "an array: 20 images, fewer than one batch of 32"),
    "a path": ("pictures", "images: a path; vqref.host.pictures.load_any reads pictures"),
    "height": (np.zeros((64, 9, 8), np.uint8), "height and width must be divisible by 4"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_images_that_cannot_train_are_refused_as_those_of_files(kind, place):
    images, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        vqtrain.train(images, **SMALL)
    assert not [*(place / "temporary").glob("vqtrain-*")]


def test_too_few_images_that_are_left_name_the_option(images):
    left = 40 - int(split(images[:40, None], 0.9).sum())
    message = f"an array: {left} images are left to train on, .*; --held-out 0 trains on all 40"
    with pytest.raises(InputError, match=message):
        vqtrain.train(images[:40], **SMALL, held_out=0.9)


def test_an_image_set_keeps_what_it_holds_out_and_what_was_done_to_it(images):
    from vqref.preprocessing import Preprocessing

    done = Preprocessing(1, (28, 28), crop=True)
    source = ImageSet(images[:64, None], images[64:, None], "a folder", "0" * 64, done, said=("s",))
    said: list[str] = []
    model = vqtrain.train(source, **SMALL, say=said.append)
    assert said[:2] == ["s", "64 images train, 32 are held out (the source's own)"]
    assert model.preprocessing == done
    assert model.provenance["data"] == {
        "source": "a folder",
        "sha256": "0" * 64,
        "images": 64,
        "held_out": {"images": 32},
    }


def test_held_out_images_may_be_an_array_and_must_fit(images):
    model = vqtrain.train(images[:64], **SMALL, held_out=images[64:, :, :, None])
    assert model.provenance["data"]["images"] == 64
    assert model.provenance["data"]["held_out"]["images"] == 32
    with pytest.raises(InputError, match=r"held_out: images of \(1, 8, 8\), those to train on"):
        vqtrain.train(images, **SMALL, held_out=np.zeros((4, 8, 8), np.uint8))


def test_an_unknown_option_is_a_type_error_that_names_the_nearest(images):
    with pytest.raises(TypeError, match=r"train\(\) has no option epoch; did you mean epochs\?"):
        vqtrain.train(images, epoch=2)
    with pytest.raises(TypeError, match=r"no option zzz$"):
        vqtrain.train(images, zzz=2)


WRONG = [
    ({"epochs": 0}, "epochs is 0; it must be an integer"),
    ({"epochs": 2.0}, r"epochs is 2\.0; it must be an integer"),
    ({"num_codes": 0}, "num_codes is 0; it must be"),
    ({"hidden": 8}, "hidden: network post has no such size"),
    ({"network": "vit"}, "network is 'vit'; it must be one of auto, post, residual"),
    ({"recipe": "seed"}, "recipe is 'seed'; it must be one of default, post, sonnet"),
    ({"device": "gpu"}, "device is 'gpu'; it must be one of auto, cpu, cuda"),
    ({"precision": "fp16"}, "it must be one of float32, tf32, bfloat16, auto"),
    ({"precision": "tf32", "device": "cpu"}, "precision tf32: only a CUDA device has it"),
    ({"likelihood": "poisson"}, "likelihood is 'poisson'; it must be one of bernoulli"),
    ({"threads": 0}, "threads is 0; it must be an integer of at least 1"),
    ({"check_images": True}, "check_images is True; it must be an integer"),
    ({"cosine": "no"}, "cosine is 'no'; it must be true or false"),
    ({"held_out": 1}, "held_out: 1 is not a fraction from 0 to below 1"),
    ({"resume": "never"}, "resume and tensorboard need a folder"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_value_that_no_option_can_have_is_a_value_error(images, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        vqtrain.train(images, **options)
    assert isinstance(caught.value, UsageError)


def test_every_option_of_the_command_line_is_one_here_unless_it_is_of_files():
    of_files = {"data", "config", "runs", "name", "json", "recursive", "skip_bad"}
    of_pictures = {"resize", "crop", "background", "channels"}
    of_shards = {"max_broken", "workers", "buffer"}
    parser = {action.dest for action in build_parser()._actions} - {"help", "version"}
    assert parser - of_files - of_pictures - of_shards == {*OPTIONS, "held_out", "output"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"recipe": "post"}, "float32"),
        ({"recipe": "sonnet"}, "float32"),
        ({"precision": "float32"}, "float32"),
        ({"recipe": "post", "precision": "auto"}, None),
    ],
)
def test_the_default_recipe_takes_the_devices_precision_and_exact_ones_float32(
    images, options, expected
):
    said: list[str] = []
    model = vqtrain.train(images, **SMALL, **options, device="cpu", say=said.append)
    fastest = choose_precision(torch.device("cpu"))
    assert model.training["precision"] == (expected or fastest)
    assert (f"precision {fastest}: what this processor multiplies fastest" in said) is (
        expected is None
    )


@pytest.mark.parametrize(("asked", "size"), [({}, 8), ({"code_size": 5}, 5)])
def test_a_grid_of_a_large_codebook_has_the_recipes_short_rows(colour_images, asked, size):
    plan = make_plan({"num_codes": 2048, "device": "cpu", **asked}, runs=Path("runs"))
    spec, sizes = build_spec(plan, ImageSet(colour_images[:4], None, "here", "0" * 64))
    assert (spec.family, spec.num_codes, spec.code_size) == ("residual", 2048, size)
    assert sizes["code_size"] == size


def test_a_folder_keeps_the_run_and_a_file_the_model(place, images):
    model = vqtrain.train(images, **SMALL, folder="runs/mine", output="mine.pt", held_out=0.25)
    kept = place / "runs" / "mine"
    for path in (place / "mine.pt", kept / "model.pt"):
        np.testing.assert_array_equal(
            read_model(path).params["encoder.conv1.weight"], model.params["encoder.conv1.weight"]
        )
    assert (kept / "report.html").exists()
    assert [*(kept / "pictures").iterdir()]
    options = tomllib.loads((kept / "options.toml").read_text())
    assert options["run"] == {"check_images": 4, "held_out": 0.25}
    read = parse_with_config(build_parser(), ["--config", str(kept / "options.toml")])
    assert (read.held_out, read.num_codes, read.precision) == (
        0.25,
        8,
        model.training["precision"],
    )
    with pytest.raises(InputError, match="is finished"):
        vqtrain.train(images, **SMALL, folder="runs/mine", held_out=0.25)
    with pytest.raises(UsageError, match=r"was begun with held_out 0\.25, not 0\.1; use"):
        vqtrain.train(images, **SMALL, folder="runs/mine")


def test_an_output_that_cannot_be_written_is_found_before_training(images):
    with pytest.raises(MachineError, match="cannot be written"):
        vqtrain.train(images, **SMALL, output="nowhere/model.pt")


def state_of_the_process():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.backends.cudnn.allow_tf32,
        dict(os.environ),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        sys.excepthook,
        sys.unraisablehook,
        Path.cwd(),
        threading.active_count(),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(images, fails, monkeypatch):
    seen = []
    if fails:
        monkeypatch.setattr(vqtrain.training, "Trainer", lambda *_: 1 / 0)
    before = state_of_the_process()

    def say(line):
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    try:
        vqtrain.train(images, **SMALL, deterministic=True, threads=before[0] + 1, say=say)
    except ZeroDivisionError:
        assert fails
    assert state_of_the_process() == before
    assert {*seen} == {(before[0] + 1, True)}


def test_it_works_in_a_thread(images):
    found = []
    thread = threading.Thread(target=lambda: found.append(vqtrain.train(images, **SMALL)))
    thread.start()
    thread.join()
    expected = vqtrain.train(images, **SMALL)
    np.testing.assert_array_equal(
        found[0].params["decoder.conv1.weight"], expected.params["decoder.conv1.weight"]
    )


CTRL_C = """
import os, signal, sys
from pathlib import Path
import numpy as np
import vqtrain, vqtrain.run.trainer
step, taken, presses = vqtrain.run.trainer.training_step, [], int(sys.argv[1])
def interrupting(*arguments):
    taken.append(1)
    if len(taken) == 3:
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
    return step(*arguments)
vqtrain.run.trainer.training_step = interrupting
images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
options = {"epochs": 2, "base_depth": 2, "num_codes": 8, "batch_size": 16, "check_images": 4}
folder = Path(sys.argv[2]) if sys.argv[2:] else None
try:
    vqtrain.train(images, **options, held_out=0, folder=folder)
    print("finished")
except KeyboardInterrupt as stop:
    print(stop)
print(len(taken), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if folder is not None:
    vqtrain.train(images, **options, held_out=0, folder=folder)
    print(len(taken))
"""


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_ctrl_c_is_a_keyboard_interrupt_and_never_ends_somebody_elses_process(run, place, presses):
    done = run("-c", CTRL_C, presses, TMPDIR=str(place / "temporary"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "interrupted; with a folder, a run is saved and goes on\n3 True\n"
    assert not [*(place / "temporary").glob("vqtrain-*")]


def test_an_interrupted_run_in_a_folder_goes_on(run, place):
    done = run("-c", CTRL_C, 1, "mine")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("interrupted in epoch 1, step 3, and saved; the same")
    assert (second, third) == ("3 True", "8")
    state, _, _ = latest_state(place / "mine")
    assert state["finished"]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_images_that_are_all_alike_are_trained_on_without_an_alarm(level):
    images = np.full((64, 8, 8), level, np.uint8)
    vqtrain.train(images, base_depth=2, num_codes=8, epochs=1, held_out=0)
