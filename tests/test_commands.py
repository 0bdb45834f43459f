"""The command lines as users run them: one line per mistake, the right exit code, nothing lost."""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, add, sign, weight_changed

from benchmarks.hostile.commandlines import Line, campaign, what_is_wrong
from vqref import families
from vqref.errors import (
    CommandError,
    ExitCode,
    InputError,
    MachineError,
    ParityError,
    Remark,
    UsageError,
)
from vqref.families import FAMILIES
from vqref.host.commandline import Parser
from vqref.host.commandline import run as run_command
from vqref.host.streams import plain
from vqref.preprocessing import Preprocessing
from vqref.spec import CODEBOOK
from vqtrain import TrainingOptions
from vqtrain.__main__ import build_parser, parse_with_config
from vqtrain.data.holdout import split
from vqtrain.device import choose_precision
from vqtrain.modelfile import read_model
from vqtrain.options import TRAINED

SMALL = ("--base-depth", "4", "--batch-size", "32")


@pytest.fixture
def data(tmp_path, many_images):
    folder = tmp_path / "kmnist"
    folder.mkdir()
    np.savez_compressed(folder / "kmnist-train-imgs.npz", many_images[:96])
    np.savez_compressed(folder / "kmnist-test-imgs.npz", many_images[96:136])
    return folder


def test_train_export_verify_from_an_empty_folder(run, data, tmp_path):
    assert data == tmp_path / "kmnist"
    trained = run("-m", "vqtrain", "--data", "./kmnist", "--epochs", 2, "--recipe", "post", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-2:] == [
        "wrote model.pt; pictures and metrics are in runs/kmnist-post",
        "next: python -m vqdeploy export model.pt",
    ]
    assert trained.stderr == ""
    exported = run("-m", "vqdeploy", "export", "model.pt")
    assert exported.returncode == 0, exported.stderr
    assert (
        exported.stdout.splitlines()[-1]
        == "wrote model-onnx; next: python -m vqdeploy verify model-onnx"
    )
    verified = run("-m", "vqdeploy", "verify", "model-onnx", "--data", "./kmnist", "--limit", 50)
    assert verified.returncode == 0, verified.stderr
    assert "model-onnx on cpu, golden batch and 50 images" in verified.stdout.splitlines()
    assert verified.stdout.splitlines()[-1] == "verified: what runs is what was trained"
    assert all(
        len(line) <= 80
        for done in (trained, exported, verified)
        for line in done.stdout.splitlines()
    )
    card = (tmp_path / "model-onnx" / "README.md").read_text()
    assert "kmnist-train-imgs.npz, 96 images" in card
    assert "held-out images" in card


GRID = ("--hidden", 16, "--blocks", 1, "--block-hidden", 8, "--num-codes", 32, "--code-size", 8)


def test_colour_images_are_trained_exported_and_verified_on_a_grid(run, tmp_path, colour_images):
    np.save(tmp_path / "colour.npy", colour_images[:96])
    trained = run("-m", "vqtrain", "--data", "colour.npy", "--epochs", 1, *GRID)
    assert trained.returncode == 0, trained.stderr
    lines = trained.stdout.splitlines()
    assert lines[0] == "87 images train, 9 are held out (a tenth, by hash)"
    assert lines[1] == "network residual: 3x16x16 images, 4x4 latents, 32 codes, gaussian"
    assert all(len(line) <= 80 for line in lines)
    spec = read_model(tmp_path / "model.pt").spec
    assert spec.family == "residual"
    train = colour_images[:96][~split(colour_images[:96], 0.1)]
    assert spec.variance == pytest.approx(np.var(train / 255), rel=1e-9)
    exported = run("-m", "vqdeploy", "export", "model.pt")
    assert exported.returncode == 0, exported.stderr
    verified = run("-m", "vqdeploy", "verify", "model-onnx", "--data", "colour.npy", "--limit", 20)
    assert verified.returncode == 0, verified.stderr


def test_unit_codes_are_trained_held_to_the_oracle_exported_and_verified(
    run, tmp_path, colour_images
):
    np.save(tmp_path / "colour.npy", colour_images[:96])
    words = ("-m", "vqtrain", "--data", "colour.npy", "--epochs", 1, *GRID, "--normalized")
    trained = run(*words, "--temperature", 0.3)
    assert trained.returncode == 0, trained.stderr
    model = read_model(tmp_path / "model.pt")
    assert model.spec.normalized
    np.testing.assert_allclose(np.linalg.norm(model.params[CODEBOOK], axis=1), 1, rtol=1e-6)
    exported = run("-m", "vqdeploy", "export", "model.pt")
    assert exported.returncode == 0, exported.stderr


def test_network_likelihood_dialect_and_checks_are_options(run, data, tmp_path):
    done = run(
        *("-m", "vqtrain", "--data", data, "--epochs", 2, "--batch-size", 32),
        *("--network", "residual", *GRID, "--downsample", 2, "--depth", 2),
        *("--likelihood", "logistic", "--recipe", "sonnet", "--dialect", "rosinality"),
        *("--check-images", 3, "--check-every", 2, "--name", "r"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "96 images train, 40 are held out (the source's own)"
    assert lines[1] == "network residual: 1x28x28 images, 14x14x2 latents, 32 codes, logistic"
    assert "agrees on 3 images" in lines[3]
    assert [line.split()[-1] for line in lines[5:7]] == ["-", "agrees"]
    found = read_model(tmp_path / "model.pt")
    assert found.spec.output_shape == (2, 28, 28)
    assert found.training["dialect"] == "rosinality"
    options = tomllib.loads((tmp_path / "runs" / "r" / "options.toml").read_text())
    assert (options["model"]["network"], options["model"]["depth"]) == ("residual", 2)
    assert options["run"]["check_images"] == 3


def test_every_option_of_training_and_every_size_of_a_family_is_on_the_command_line():
    parser = {action.dest for action in build_parser()._actions}
    sizes = {name for family in FAMILIES for name in families.sizes(family)}
    assert parser >= sizes | {field.name for field in dataclasses.fields(TrainingOptions)}


def test_a_size_that_the_network_lacks_is_named(refused, data, tmp_path, colour_images):
    np.save(tmp_path / "colour.npy", colour_images)
    line = refused(2, "-m", "vqtrain", "--data", data, "--hidden", 16)
    assert line == "vqtrain: --hidden: network post has no such size\n"
    line = refused(2, "-m", "vqtrain", "--data", "colour.npy", "--latent-size", 4)
    assert line == "vqtrain: --latent-size: network residual has no such size\n"
    line = refused(2, "-m", "vqtrain", "--data", "colour.npy", "--downsample", 6)
    assert line == "vqtrain: downsample is 6; it must be a power of two above 1\n"
    line = refused(3, "-m", "vqtrain", "--data", "colour.npy", "--downsample", 32)
    assert "colour.npy: image_shape is (3, 16, 16); height and width must be divisible" in line
    line = refused(2, "-m", "vqtrain", "--data", data, "--dialect", "tf")
    assert "choose from 'post', 'sonnet', 'rosinality'" in line
    line = refused(2, "-m", "vqtrain", "--data", data, "--resize", "28")
    assert "argument --resize: '28' is not like 28x28" in line


def test_verify_answers_programs_in_json(run, bundle):
    done = run("-m", "vqdeploy", "verify", bundle, "--device", "cpu", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert {c["stage"] for c in report["checks"]} >= {
        "encoder",
        "quantizer",
        "decoder",
        "tokenizer",
        "detokenizer",
    }


def test_verify_of_a_bundle_that_disagrees_exits_4_and_says_which_stage(run, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    weight_changed(copy, "decoder", "decoder.conv1.bias", add(0, 0.01))
    sign(copy)
    done = run("-m", "vqdeploy", "verify", copy)
    assert done.returncode == 4
    assert "decoder: the worst at" in done.stdout
    assert done.stdout.splitlines()[-1] == "NOT verified: see the lines above"


BAD_DATA = {
    "NaN": (np.full((64, 28, 28), np.nan), r"nan at"),
    "range": (np.full((64, 28, 28), 2.0), "values from 2 to 2"),
    "dtype": (np.zeros((64, 28, 28), np.int32), "dtype is int32"),
    "shape": (np.zeros((64, 784), np.uint8), "shape is (64, 784)"),
    "too few": (np.zeros((31, 28, 28), np.uint8), "31 images, fewer than one batch of 32"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_images_that_cannot_train_exit_3_with_one_line_and_no_file(refused, tmp_path, kind):
    array, message = BAD_DATA[kind]
    np.savez(tmp_path / "x.npz", array)
    assert message in refused(3, "-m", "vqtrain", "--data", "x.npz", *SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_missing_file_and_an_odd_size_are_refused(refused, tmp_path):
    assert "nowhere.npz: No such file" in refused(3, "-m", "vqtrain", "--data", "nowhere.npz")
    np.save(tmp_path / "x.npy", np.zeros((64, 30, 28), np.uint8))
    assert "height and width must be divisible by 4" in refused(
        3, "-m", "vqtrain", "--data", "x.npy"
    )


def test_an_output_that_cannot_be_written_is_found_before_training(refused, data):
    line = refused(5, "-m", "vqtrain", "--data", data, "--output", "nowhere/model.pt", *SMALL)
    assert line == "vqtrain: nowhere/model.pt: cannot be written: No such file or directory\n"
    assert "is a folder" in refused(5, "-m", "vqtrain", "--data", data, "--output", ".", *SMALL)


def test_unknown_options_name_the_nearest_and_bad_values_are_usage(refused, data):
    assert "unknown option --epoch; did you mean --epochs?" in refused(
        2, "-m", "vqtrain", "--data", data, "--epoch", 2
    )
    assert "unknown option --dvice; did you mean --device?" in refused(
        2, "-m", "vqdeploy", "verify", "x", "--dvice=cpu"
    )
    assert "unknown option --qqq" in refused(2, "-m", "vqtrain", "--data", data, "--qqq")
    assert "epochs is 0; it must be" in refused(2, "-m", "vqtrain", "--data", data, "--epochs", 0)
    assert "num-codes is 0; it must be" in refused(
        2, "-m", "vqtrain", "--data", data, "--num-codes", 0
    )
    assert "invalid int value: 'many'" in refused(
        2, "-m", "vqtrain", "--data", data, "--epochs", "many"
    )
    assert "did you mean --data?" in refused(2, "-m", "vqtrain", "--dta", data)
    assert "seed is 18446744073709551616" in refused(
        2, "-m", "vqtrain", "--data", data, "--seed", 2**64
    )
    assert "COMMAND" in refused(2, "-m", "vqdeploy")
    assert "0 is not at least 1" in refused(2, "-m", "vqdeploy", "verify", "x", "--limit", 0)


def test_tf32_without_a_card_is_refused(refused, data):
    """On a processor, tf32 would be float32 under another name."""
    line = refused(2, "-m", "vqtrain", "--data", data, "--device", "cpu", "--precision", "tf32")
    assert (
        line
        == "vqtrain: --precision tf32: only a CUDA device has it; use float32, bfloat16 or auto\n"
    )


def test_a_model_file_that_is_none_exits_3_and_leaves_nothing(refused, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    assert "not a model file" in refused(3, "-m", "vqdeploy", "export", "text.pt")
    assert "nowhere.pt: No such file" in refused(3, "-m", "vqdeploy", "export", "nowhere.pt")
    torch.save({"format": "vqtrain-model", "format_version": 9}, tmp_path / "newer.pt")
    assert "format version 9 is newer" in refused(3, "-m", "vqdeploy", "export", "newer.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer.pt", "text.pt"]


def test_a_bundle_that_is_none_or_exists_exits_3(refused, bundle, model_file, tmp_path):
    assert "not a bundle" in refused(3, "-m", "vqdeploy", "verify", tmp_path)
    assert "exists already; use --replace" in refused(
        3, "-m", "vqdeploy", "export", model_file, "--output", bundle
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_named_device_that_is_absent_exits_5(refused, bundle, data):
    assert "--device cuda: PyTorch finds no CUDA device" in refused(
        5, "-m", "vqtrain", "--data", data, "--device", "cuda"
    )
    assert "device cuda:" in refused(5, "-m", "vqdeploy", "verify", bundle, "--device", "cuda")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError("x"), 1),
        (UsageError("x"), 2),
        (InputError("x"), 3),
        (ParityError("x"), 4),
        (MachineError("x"), 5),
        (OSError(28, "No space left on device", "model.pt"), 5),
        (MemoryError("9 GiB"), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nto"), 5),
        (RecursionError("maximum recursion depth exceeded"), 3),
        (OverflowError("int too large to convert"), 3),
        (InputError("a name \x1b[2J of\na file, \udcff, \u202e" + 5000 * "x"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_one_line(error, code, capsys):
    def command(_):
        raise error

    assert run_command("tool", command, []) == code
    said = capsys.readouterr().err
    assert said.startswith("tool: ")
    assert said[:-1].isprintable()
    assert (said[-1], len(said) < 1100) == ("\n", True)


def test_a_bug_keeps_its_traceback():
    def command(_):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command("tool", command, [])


def test_what_a_terminal_would_act_on_is_escaped():
    assert plain("é × … 字") == "é × … 字"
    assert plain("\x1b[31m\n\t\x9b\u202e\udcff") == r"\x1b[31m\n\t\x9b\u202e\udcff"


def test_libraries_say_nothing_on_stderr_and_remarks_are_a_line_each(capsys):
    def command(_):
        warnings.warn("of a library", RuntimeWarning, stacklevel=1)
        logging.getLogger("a library").warning("of a library")
        warnings.warn(Remark("to\nthe user"), stacklevel=1)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run_command("tool", command, []) == 0
    assert capsys.readouterr().err == "tool: to the user\n"


WRONG_VALUES = [
    ("vqdeploy", "bench", "b", "--seconds", "nan"),
    ("vqdeploy", "bench", "b", "--seconds=-1"),
    ("vqdeploy", "bench", "b", "--seconds", "1e999"),
    ("vqdeploy", "bench", "b", "--batch", 10**20),
    ("vqdeploy", "sample", "b", "--number", 10**20),
    ("vqdeploy", "sample", "b", "--number", ""),
    ("vqdeploy", "sample", "b", "--seed", 2**63),
    ("vqdeploy", "sample", "b", "--output=--"),
    ("vqdeploy", "export", "m", "--static-batch", 10**20),
    ("vqdeploy", "export", "m", "--opset", "9" * 5000),
    ("vqdeploy", "verify", "b", "--samples", "1.5"),
    ("vqtrain", "evaluate", "m", "--seed=-1", "--binarize"),
    ("vqtrain", "evaluate", "m", "--resize", "0x0"),
    ("vqtrain", "--name", "../elsewhere"),
    ("vqtrain", "--snapshot-steps", 0),
    ("vqtrain", "--seed", "9" * 5000),
    ("vqref", "vectors", "v", "--seed=-1"),
]


@pytest.mark.parametrize("words", WRONG_VALUES, ids=lambda words: " ".join(map(str, words))[:40])
def test_a_value_that_no_option_can_have_is_usage(words, capsys):
    program = import_module(f"{words[0]}.__main__")
    with pytest.raises(SystemExit) as caught:
        program.main([str(word) for word in words[1:]])
    said = capsys.readouterr().err
    assert (caught.value.code, len(said.splitlines())) == (ExitCode.USAGE, 1)
    assert len(said) < 1100


WRONG_CONFIGS = {
    "beta = [1]": "beta is a list",
    "beta = nan": "beta is nan",
    "a.epochs = {n = 1}": "epochs is a dict",
    "epochs = 1979-05-27": "epochs is a date",
    "seed = 0x1" + 9000 * "0": "seed is an integer of more than 64 bits",
    "seed = " + 5000 * "9": "not TOML",
    "seed = " + 3000 * "[" + 3000 * "]": "not TOML",
    "epochs = true": "epochs is true; it must be a number or a text",
    "cosine = 'yes'": "cosine is 'yes'; it must be true or false",
    r'data = "a\u0000b"': r"data is 'a\x00b'; a text must not contain a null character",
    "help = true": "unknown option help",
}


@pytest.mark.parametrize("content", WRONG_CONFIGS, ids=lambda content: content[:20])
def test_a_value_of_another_kind_in_a_config_is_named(tmp_path, content):
    path = tmp_path / "c.toml"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        parse_with_config(build_parser(), ["--config", str(path)])
    assert str(caught.value).startswith(f"{path}: {WRONG_CONFIGS[content]}")


def shell(redirections, *words, cwd):
    """Runs ``python -m`` under a shell that closes or redirects its streams."""
    script = f'exec "$@" {redirections}'
    command = ["sh", "-c", script, "sh", sys.executable, "-m", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_change_neither_files_nor_exit_codes(redirections, bundle, tmp_path):
    done = shell(redirections, "vqdeploy", "sample", bundle, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert shell(redirections, "vqdeploy", "--help", cwd=tmp_path).returncode == 0
    failed = shell(redirections, "vqdeploy", "inspect", "nothing", cwd=tmp_path)
    assert failed.returncode == 3
    assert len(failed.stderr.splitlines()) == ("2>&-" not in redirections)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_errors_that_cannot_be_written_keep_their_exit_code(tmp_path):
    for words, code in ((("inspect", "nothing"), 3), (("inspekt",), 2), (("--seconds",), 2)):
        assert shell("2>/dev/full", "vqdeploy", *words, cwd=tmp_path).returncode == code


def test_help_and_errors_that_nobody_reads_are_no_traceback(tmp_path):
    for words, code in ((["--help"], 1), (["inspect", "nothing"], 3), (["inspekt"], 2)):
        process = subprocess.Popen(
            [sys.executable, "-m", "vqdeploy", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()
        if code != 1:
            process.stderr.close()
        else:
            assert process.stderr.read() == b""
            process.stderr.close()
        assert process.wait() == code


def test_output_that_a_terminal_lacks_characters_for_is_escaped(run, bundle):
    done = run("-m", "vqdeploy", "inspect", bundle, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u2026" in done.stdout


def test_paths_that_are_no_text_are_named_with_escapes(refused):
    line = refused(3, "-m", "vqdeploy", "inspect", os.fsdecode(b"\xff\n\x1b"))
    assert line.startswith(r"vqdeploy: \udcff \x1b")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-1000, ""),
        (-11, ""),
        (1, 'Traceback (most recent call last):\n  File "x.py"\nKeyError: 1\n'),
        (0, "vqtrain: a\nvqtrain: b\n"),
        (3, "/site-packages/x.py:1: UserWarning: careful\n"),
        (3, "vqtrain: \x1b[2J\n"),
        (3, ""),
    ],
)
def test_an_end_that_breaks_the_promise_is_found(code, said):
    line = Line(("vqtrain",), "plain", "plain", "work")
    assert what_is_wrong(line, 3, "vqtrain: x.npz: no images\n") is None
    assert what_is_wrong(line, code, said)


def test_command_lines_at_random_end_as_they_should():
    """Tries a few; ``python -m benchmarks.hostile.commandlines`` runs as many as you like."""
    assert campaign(25, jobs=2).wrong == []


def test_a_reader_that_closes_the_pipe_is_no_traceback(run, bundle):
    code = f"""
import subprocess, sys
command = [sys.executable, "-m", "vqdeploy", "verify", {str(bundle)!r}]
p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
p.stdout.close()
print(p.stderr.read().decode())
print(p.wait())
"""
    assert run("-c", code).stdout == "\n1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line(run, bundle):
    code = f"""
import subprocess, sys
command = [sys.executable, "-m", "vqdeploy", "verify", {str(bundle)!r}]
with open("/dev/full", "w") as full:
    p = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
print(p.stderr, end="")
print(p.returncode)
"""
    assert run("-c", code).stdout == "vqdeploy: standard output: No space left on device\n5\n"


def test_abbreviations_are_not_guessed(capsys):
    parser = Parser(prog="tool")
    parser.add_argument("--epochs")
    with pytest.raises(SystemExit) as caught:
        parser.parse(["--epo", "3"])
    assert caught.value.code == ExitCode.USAGE
    assert "did you mean --epochs?" in capsys.readouterr().err


def test_the_last_line_is_json_where_it_is_asked_for_and_event_files_are_written(
    run, data, tmp_path
):
    train = ("-m", "vqtrain", "--data", data, "--epochs", 1, "--name", "r")
    done = run(*train, "--json", "--tensorboard", *SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["epoch"] == 1
    assert found["held_out"]["bound"] > 0
    assert [*(tmp_path / "runs" / "r" / "tensorboard").glob("events.out.tfevents.*")]


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="no folder here that nobody can write to"
)
def test_a_folder_for_runs_that_cannot_be_written_exits_5(refused, data):
    assert "cannot be written" in refused(
        5, "-m", "vqtrain", "--data", data, "--runs", "/proc/runs", *SMALL
    )


def test_samples_are_certified_in_the_bundle(run, refused, bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    done = run("-m", "vqdeploy", "verify", copy, "--samples", 3000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("copy on cpu, golden batch and 3000 latents")
    certificate = json.loads((copy / "certificate.json").read_text())
    assert certificate["verdict"] == "verified"
    assert (
        certificate["manifest_sha256"]
        == hashlib.sha256((copy / "manifest.json").read_bytes()).hexdigest()
    )
    assert certificate["compared"] == {"golden_batch": True, "images": 0, "latents": 3000}
    found = {check["stage"]: check for check in certificate["report"]["checks"]}
    assert found["drawn"]["compared"] >= 1500
    assert found["bisectors"]["near_ties"] > 0
    assert (
        run("-m", "vqdeploy", "verify", copy).returncode == 0
    )  # the certificate is not a file of the bundle

    line = refused(
        5, "-m", "vqdeploy", "verify", copy, "--certificate", tmp_path / "none" / "c.json"
    )
    assert "none" in line
    refused(2, "-m", "vqdeploy", "verify", copy, "--samples", "-1")


@pytest.fixture
def pictures(tmp_path, many_images):
    """A folder of 70 colour pictures of two sizes, one of them transparent, with a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, image in enumerate(many_images[:70]):
        picture = Image.fromarray(image).convert("RGB")
        picture = picture.resize((16, 16 if i % 2 else 24))
        place = folder / "below" if i >= 60 else folder
        picture.save(place / f"{i:02d}.png")
    Image.new("RGBA", (16, 16), (200, 0, 0, 0)).save(folder / "clear.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


def test_pictures_are_trained_on_as_the_options_say_and_the_model_knows_it(
    run, refused, pictures, tmp_path
):
    train = ("-m", "vqtrain", "--data", "pictures", "--epochs", 1, *GRID, "--check-images", 2)
    how = ("--resize", "16x16", "--crop", "--background", "black", "--channels", 3)
    line = refused(3, *train, *how)
    assert "broken.png: not a readable image" in line
    assert "--skip-bad" in line
    named = ("--name", "r", "--batch-size", 16)
    done = run(*train, *how, "--recursive", "--skip-bad", *named)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "images train" in line)
    said = "\n".join(lines[:start])
    assert "cropped" in said
    assert "#000000" in said
    assert "broken.png" in said
    assert re.fullmatch(r"\d+ images train, \d+ are held out \(a tenth, by hash\)", lines[start])
    kept, apart = (int(n) for n in re.findall(r"\d+", lines[start]))
    assert kept + apart == 71
    model = read_model(tmp_path / "model.pt")
    assert model.preprocessing == Preprocessing(3, (16, 16), crop=True, background=(0, 0, 0))
    assert model.provenance["data"]["held_out"] == {"fraction": 0.1, "images": apart}
    options = tomllib.loads((tmp_path / "runs" / "r" / "options.toml").read_text())["run"]
    assert options["resize"] == "16x16"
    assert options["background"] == "#000000"
    assert (options["crop"], options["channels"], options["recursive"]) == (True, 3, True)
    again = run(
        *("-m", "vqtrain", "--config", "runs/r/options.toml", "--name", "again", "--check-images"),
        *(2, "--output", "again.pt"),
    )
    assert again.returncode == 0, again.stderr
    assert read_model(tmp_path / "again.pt").preprocessing == model.preprocessing
    line = refused(2, *train, *named, "--resize", "16x16", "--recursive", "--skip-bad")
    assert line == (
        "vqtrain: runs/r was begun with crop True, not False, background '#000000', "
        "not '#ffffff'; use the same options, or another --name\n"
    )


def test_picture_options_that_make_no_sense_are_one_line(refused, data, pictures):
    train = ("-m", "vqtrain", *SMALL, "--data")
    for option in (("--resize", "8x8"), ("--channels", 3), ("--recursive",), ("--skip-bad",)):
        line = refused(3, *train, data, *option)
        assert line.startswith(f"vqtrain: {option[0]} is for a folder of pictures")
    assert "--crop needs" in refused(2, *train, pictures, "--crop")
    line = refused(2, *train, pictures, "--channels", 4, "--background", "white")
    assert line == "vqtrain: --background: --channels 4 keeps what is transparent\n"
    line = refused(2, *train, pictures, "--background", "mauve")
    assert "'mauve' is not like #ffffff, white or black" in line
    assert "choose from" in refused(2, *train, pictures, "--channels", 2)


def test_held_out_images_are_a_share_or_others_and_part_of_the_course(
    run, refused, tmp_path, many_images
):
    np.save(tmp_path / "x.npy", many_images[:96])
    np.save(tmp_path / "test.npy", many_images[96:116])
    train = ("-m", "vqtrain", "--data", "x.npy", "--epochs", 1, "--check-images", 2, *SMALL)
    for held_out, line, of_model in (
        ((), "are held out (a tenth, by hash)", {"fraction": 0.1}),
        (("--held-out", 0), "96 images train, none are held out", {"fraction": 0.0}),
        (
            ("--held-out", "test.npy"),
            "96 images train, 20 are held out (test.npy)",
            {"source": "test.npy"},
        ),
    ):
        done = run(*train, *held_out, "--resume", "never")
        assert done.returncode == 0, done.stderr
        assert line in done.stdout.splitlines()[0]
        found = read_model(tmp_path / "model.pt")
        assert found.provenance["data"]["held_out"].items() >= of_model.items()
        assert ("held_out" in found.metrics) is (held_out != ("--held-out", 0))
    share = int(split(many_images[:96, None], 0.1).sum())
    first = read_model(tmp_path / "runs" / "x-default" / "model.pt").provenance["data"]
    assert (first["images"], first["held_out"]["images"]) == (96 - share, share)
    line = refused(2, *train, "--name", "x-default", "--held-out", 0.2)
    assert line == (
        "vqtrain: runs/x-default was begun with held_out 0.1, not 0.2; use the same options, "
        "or another --name\n"
    )
    assert "1 is not a fraction from 0 to below 1; for a file, write ./1" in refused(
        2, *train, "--held-out", 1
    )
    assert "nowhere: No such file" in refused(3, *train, "--held-out", "nowhere")
    np.save(tmp_path / "x.npy", many_images[:33])
    assert "; --held-out 0 trains on all 33" in refused(3, *train, "--held-out", 0.9)


def test_precision_is_the_devices_own_unless_a_recipe_is_exact(run, refused, data, tmp_path):
    train = ("-m", "vqtrain", "--data", data, "--epochs", 1, "--device", "cpu", *SMALL)
    fastest = choose_precision(torch.device("cpu"))
    for recipe, precision in (("default", fastest), ("sonnet", "float32")):
        done = run(*train, "--recipe", recipe, "--check-images", 2)
        assert done.returncode == 0, done.stderr
        said = f"precision {fastest}: what this processor multiplies fastest"
        assert (said in done.stdout) is (recipe == "default")
        assert read_model(tmp_path / "model.pt").training["precision"] == precision
    line = refused(2, *train, "--precision", "fp16")
    assert all(word in line for word in (*TRAINED, "auto"))


def test_threads_are_as_many_as_are_asked_for(run, refused, data):
    code = """
import sys, torch
import vqtrain.run.trainer
from vqtrain.__main__ import main
check = vqtrain.run.trainer.check_against_oracle
def counting(*arguments, **more):
    print("threads", torch.get_num_threads())
    return check(*arguments, **more)
vqtrain.run.trainer.check_against_oracle = counting
sys.exit(main(sys.argv[1:]))
"""
    train = ("--data", data, "--epochs", 1, "--check-images", 2, *SMALL)
    done = run("-c", code, *train, "--threads", 3)
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if "threads" in line} == {"threads 3"}
    assert "0 is not at least 1" in refused(2, "-m", "vqtrain", *train, "--threads", 0)
