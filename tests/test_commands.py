"""The command lines as a user has them: a line per mistake, the right exit code, nothing lost."""

import dataclasses
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from support import add, sign, weight_changed

from vqref import families
from vqref.errors import CommandError, ExitCode, InputError, MachineError, ParityError, UsageError
from vqref.families import FAMILIES
from vqref.host.commandline import Parser
from vqref.host.commandline import run as run_command
from vqtrain import TrainingOptions
from vqtrain.__main__ import build_parser
from vqtrain.modelfile import read_model

SMALL = ("--base-depth", "4", "--batch-size", "32")


@pytest.fixture
def data(tmp_path, many_images):
    folder = tmp_path / "kmnist"
    folder.mkdir()
    np.savez_compressed(folder / "kmnist-train-imgs.npz", many_images[:96])
    np.savez_compressed(folder / "kmnist-test-imgs.npz", many_images[96:136])
    return folder


def test_train_export_verify_from_an_empty_folder(run, data, tmp_path):
    trained = run("-m", "vqtrain", "--data", data, "--epochs", 2, "--recipe", "post", *SMALL)
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
    verified = run("-m", "vqdeploy", "verify", "model-onnx", "--data", data, "--limit", 50)
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.splitlines()[0] == "model-onnx on cpu, golden batch and 50 images"
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
    assert lines[0] == "network residual: 3x16x16 images, 4x4 latents, 32 codes, gaussian"
    assert all(len(line) <= 80 for line in lines)
    spec = read_model(tmp_path / "model.pt").spec
    assert spec.family == "residual"
    assert spec.variance == pytest.approx(np.var(colour_images[:96] / 255), rel=1e-9)
    exported = run("-m", "vqdeploy", "export", "model.pt")
    assert exported.returncode == 0, exported.stderr
    verified = run("-m", "vqdeploy", "verify", "model-onnx", "--data", "colour.npy", "--limit", 20)
    assert verified.returncode == 0, verified.stderr


def test_network_likelihood_dialect_and_checks_are_options(run, data, tmp_path):
    done = run(
        *("-m", "vqtrain", "--data", data, "--epochs", 2, "--batch-size", 32),
        *("--network", "residual", *GRID, "--downsample", 2, "--depth", 2),
        *("--likelihood", "logistic", "--recipe", "sonnet", "--dialect", "rosinality"),
        *("--check-images", 3, "--check-every", 2, "--name", "r"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "network residual: 1x28x28 images, 14x14x2 latents, 32 codes, logistic"
    assert "agrees on 3 images" in lines[2]
    assert [line.split()[-1] for line in lines[4:6]] == ["-", "agrees"]
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
    """On a processor it would be float32 under another name."""
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
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_one_line(error, code, capsys):
    def command(_):
        raise error

    assert run_command("tool", command, []) == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_bug_keeps_its_traceback():
    def command(_):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_command("tool", command, [])


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
    )  # the certificate is no file of the bundle's

    line = refused(
        5, "-m", "vqdeploy", "verify", copy, "--certificate", tmp_path / "none" / "c.json"
    )
    assert "none" in line
    refused(2, "-m", "vqdeploy", "verify", copy, "--samples", "-1")
