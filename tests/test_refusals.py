"""Bundles that must not run, by the command line: one line, exit code 3, nothing executed."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from support import ROOT, sign, weight_changed

from vqdeploy.bundle import FILES, MANIFEST
from vqdeploy.sealed import sealed, unsealed


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def manifest_changed(folder, **changes):
    """Changes the manifest and seals it again."""
    manifest = unsealed((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(sealed(manifest | changes))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_in_any_file(copy, refused, name):
    content = bytearray((copy / name).read_bytes())
    content[0 if name == MANIFEST else len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert name in refused(3, "-m", "vqdeploy", "inspect", copy)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_truncated_file(copy, refused, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-2])
    assert name in refused(3, "-m", "vqdeploy", "inspect", copy)


@pytest.mark.parametrize("way", ["path", "symlink", "hard link"])
def test_weights_outside_the_file(copy, refused, tmp_path, way):
    """A name in the bundle leads to a secret file beside it; onnxruntime would follow all three."""
    model = onnx.load(copy / "tokenizer.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "quantizer.codebook")
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(tensor.raw_data))
    place = "../secret" if way == "path" else "weights.bin"
    if way == "symlink":
        (copy / "weights.bin").symlink_to(secret)
    elif way == "hard link":
        os.link(secret, copy / "weights.bin")
    onnx.external_data_helper.set_external_data(tensor, place)
    tensor.ClearField("raw_data")
    (copy / "tokenizer.onnx").write_bytes(model.SerializeToString())
    sign(copy)
    assert "keeps weights outside the file" in refused(3, "-m", "vqdeploy", "sample", copy)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("op_type", "Loop", "Loop"), ("domain", "com.evil", "an operator of another domain")],
)
def test_an_operator_or_domain_that_no_bundle_has(copy, refused, field, value, said):
    model = onnx.load(copy / "detokenizer.onnx")
    setattr(model.graph.node[0], field, value)
    (copy / "detokenizer.onnx").write_bytes(model.SerializeToString())
    sign(copy)
    line = refused(3, "-m", "vqdeploy", "sample", copy)
    assert "detokenizer.onnx: refused: " in line
    assert said in line


def test_a_file_that_is_larger_than_it_says_and_one_that_says_too_much(copy, refused):
    with (copy / "decoder.onnx").open("ab") as file:
        file.truncate(3 * 2**30)  # sparse; nothing of it is read
    assert "decoder.onnx: 3221225472 bytes, more than" in refused(
        3, "-m", "vqdeploy", "inspect", copy
    )
    with (copy / "decoder.onnx").open("ab") as file:
        file.truncate(2**20)
    assert "decoder.onnx: damaged: its size" in refused(3, "-m", "vqdeploy", "inspect", copy)
    files = unsealed((copy / MANIFEST).read_bytes())["files"]
    files["decoder.onnx"]["bytes"] = 3 * 2**30
    manifest_changed(copy, files=files)
    assert "size or sha256 of decoder.onnx is malformed" in refused(
        3, "-m", "vqdeploy", "inspect", copy
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 3}, "newer than 2"),
        ({"format_version": 1}, "export its model.pt again"),
        ({"precision": "float8"}, "precision is 'float8'"),
        ({"batch": 0}, "batch is 0"),
        ({"format": "other"}, "not the manifest of a bundle"),
    ],
)
def test_a_manifest_that_speaks_of_something_else(copy, refused, changes, said):
    manifest_changed(copy, **changes)
    assert said in refused(3, "-m", "vqdeploy", "inspect", copy)


def test_a_killed_export_leaves_no_bundle_where_one_should_be(model_file, refused, run, tmp_path):
    """SIGKILL comes as soon as the first file of the new folder is there."""
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "vqdeploy", "export", model_file, "--output", tmp_path / "out"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not [*tmp_path.glob(".out.*/*")]:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (tmp_path / "out").exists():
            break
        shutil.rmtree(tmp_path / "out")  # export was quicker
    else:
        pytest.skip("the export was quicker than the signal, three times")
    (partial,) = tmp_path.glob(".out.*")
    if not (partial / MANIFEST).exists():
        assert "not a bundle" in refused(3, "-m", "vqdeploy", "inspect", partial)
    done = run("-m", "vqdeploy", "export", model_file, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_an_encoder_of_another_model_signed_into_a_bundle_is_refuted(copy, run):
    """The files fit the manifest, and the manifest fits its files. The oracle finds it."""

    def change(array):
        array *= np.float32(1.01)

    weight_changed(copy, "tokenizer", "encoder.conv1.weight", change)
    sign(copy)
    done = run("-m", "vqdeploy", "verify", copy)
    assert done.returncode == 4
    assert "NOT verified" in done.stdout
