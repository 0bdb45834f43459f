"""model.pt: plain data. Anything else is refused in one line, and nothing in it is executed."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Trap

from vqref.errors import InputError, MachineError
from vqref.host.files import require_writable, write_file
from vqref.modelfile import Model
from vqtrain.modelfile import read_model, write_model


@pytest.mark.parametrize("family", ["model", "residual_model"])
def test_a_model_survives_its_file(family, request, tmp_path):
    model = request.getfixturevalue(family)
    write_model(tmp_path / "m.pt", model)
    found = read_model(tmp_path / "m.pt")
    assert (found.spec, found.training, found.provenance) == (
        model.spec,
        model.training,
        model.provenance,
    )
    assert list(found.params) == list(model.params)
    for name, array in model.params.items():
        assert found.params[name].dtype == array.dtype
        np.testing.assert_array_equal(found.params[name], array)


def test_a_file_of_version_1_is_read_as_family_post(golden, tmp_path):
    """Version 1 held the sizes of the post's network, not its rows."""
    spec = golden.spec
    sizes = {
        "image_shape": list(spec.image_shape),
        "base_depth": spec.encoder[0].out_shape[0],
        "latent_size": spec.latent_size,
        "num_codes": spec.num_codes,
        "code_size": spec.code_size,
    }
    params = {name: array.astype(np.float32) for name, array in golden.params.items()}
    plain = Model(spec, params).to_plain() | {"format_version": 1, "spec": sizes}
    tensors = {name: torch.from_numpy(array) for name, array in params.items()}
    torch.save({**plain, "parameters": tensors}, tmp_path / "m.pt")
    found = read_model(tmp_path / "m.pt")
    assert found.spec == spec
    for name, array in params.items():
        np.testing.assert_array_equal(found.params[name], array)


def test_the_file_is_plain_data_for_torch_alone(model_file, model):
    data = torch.load(model_file, weights_only=True)
    assert (data["format"], data["format_version"]) == ("vqtrain-model", 2)
    assert data["spec"] == model.spec.to_dict()
    assert all(isinstance(value, torch.Tensor) for value in data["parameters"].values())


@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_nothing_runs(tmp_path, form):
    sprung, path = tmp_path / "sprung", tmp_path / "evil.pt"
    if form == "zip":
        torch.save({"format": "vqtrain-model", "trap": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match=r"evil\.pt: refused: .*nothing was executed"):
        read_model(path)
    assert not sprung.exists()


def rewritten(model_file: Path, path: Path, change) -> Path:
    """Writes a changed file without a digest, so that the error names what is wrong."""
    data = torch.load(model_file, weights_only=True)
    del data["sha256"]
    change(data)
    torch.save(data, path)
    return path


def without(*keys: str):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


DAMAGE = {
    "newer": (
        lambda d: d.update(format_version=3),
        "format version 3 is newer than 2, the newest known; upgrade",
    ),
    "no version": (without("format_version"), "format version is None, expected 2"),
    "no format": (without("format"), "not a model file"),
    "no metrics": (without("metrics"), "the entry 'metrics' is missing"),
    "no weight": (
        without("parameters", "decoder.conv1.weight"),
        r"parameters missing: decoder\.conv1\.weight",
    ),
    "no size": (without("spec", "num_codes"), "the spec lacks num_codes"),
    "other sizes": (
        lambda d: d["spec"].update(num_codes=17),
        r"quantizer\.codebook: shape is \(16, 8\), expected \(17, 8\)",
    ),
    "integers": (
        lambda d: d["parameters"].update({"decoder.conv1.bias": torch.zeros(1, dtype=torch.int64)}),
        r"the parameter 'decoder\.conv1\.bias' is int64, expected float32",
    ),
    "nan": (
        lambda d: d["parameters"]["encoder.dense.bias"].fill_(torch.nan),
        r"encoder\.dense\.bias: nan at \(0,\)",
    ),
    "text": (
        lambda d: d["parameters"].update({"decoder.conv1.bias": "zero"}),
        r"'decoder\.conv1\.bias' is str, expected float32",
    ),
    "float64": (
        lambda d: d["parameters"].update({"decoder.conv1.bias": torch.zeros(1).double()}),
        "is float64, expected",
    ),
    "bfloat16": (
        lambda d: d["parameters"].update({"decoder.conv1.bias": torch.zeros(1).bfloat16()}),
        r"is torch\.bfloat16",
    ),
    "sparse": (
        lambda d: d["parameters"].update({"decoder.conv1.bias": torch.zeros(1).to_sparse()}),
        "expected float32",
    ),
    "odd key": (
        lambda d: d["parameters"].update({3: torch.zeros(1)}),
        "the parameter 3 is float32",
    ),
    "tensor in metrics": (
        lambda d: d["metrics"].update(x=torch.zeros(1)),
        "'metrics' holds more than plain data",
    ),
    "nan in metrics": (
        lambda d: d["metrics"].update(x=float("nan")),
        "'metrics' holds more than plain data",
    ),
    "odd data": (
        lambda d: d["provenance"].update(data="kmnist"),
        r"provenance\.data is not a dictionary",
    ),
    "no rows": (lambda d: d["spec"].update(encoder=[]), "the encoder has 0 rows"),
    "a row of another kind": (
        lambda d: d["spec"]["encoder"][0].update(kind="loop"),
        r"encoder\.conv1: kind is 'loop', expected affine",
    ),
    "a row with an unknown field": (
        lambda d: d["spec"]["decoder"][1].update(dilation=2),
        r"decoder\.deconv1: unknown fields: dilation",
    ),
    "a row of another size": (
        lambda d: d["spec"]["encoder"][1].update(in_shape=[4, 14, 28]),
        r"encoder\.conv2: out_shape is \(4, 14, 14\), a conv of these sizes gives",
    ),
    "true version": (lambda d: d.update(format_version=True), "format version is True"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_with_its_damage(model_file, tmp_path, kind):
    change, message = DAMAGE[kind]
    with pytest.raises(InputError, match=message) as caught:
        read_model(rewritten(model_file, tmp_path / "m.pt", change))
    assert str(caught.value).startswith(f"{tmp_path / 'm.pt'}: ")


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_of_a_model_file_passes(model_file, tmp_path):
    """This includes the padding between arrays, the dates, and the seal itself."""
    content, rng = model_file.read_bytes(), np.random.default_rng(0)
    last = range(8 * len(content) - 8 * 110, 8 * len(content))  # the last record and the seal
    for bit in (*rng.integers(0, 8 * len(content), 200), *last):
        (tmp_path / "m.pt").write_bytes(flipped(content, int(bit)))
        with pytest.raises(InputError, match=r"m\.pt: "):
            read_model(tmp_path / "m.pt")


CHANGES = {
    "a weight": lambda d: d["parameters"]["encoder.dense.bias"].add_(1e-6),
    "a number of the training": lambda d: d["training"].update(epochs=2),
    "the digest": lambda d: d.update(sha256="0" * 64),
    "a digest that is no text": lambda d: d.update(sha256=None),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_content_that_was_changed_and_saved_again_is_refused(model_file, tmp_path, kind):
    data = torch.load(model_file, weights_only=True)
    torch.save(data, tmp_path / "same.pt")
    assert read_model(tmp_path / "same.pt").digested
    CHANGES[kind](data)
    torch.save(data, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt: damaged or changed: its digest is not"):
        read_model(tmp_path / "m.pt")


def test_an_entry_that_no_version_has_is_refused(model_file, tmp_path):
    with pytest.raises(InputError, match=r"unknown entries: 'sha25v'"):
        read_model(rewritten(model_file, tmp_path / "m.pt", lambda d: d.update(sha25v="0" * 64)))


def nested(levels: int, width: int) -> list[Any]:
    """Returns nested lists; each holds the one below ``width`` times. Few bytes, many values."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found] * width
    return found


@pytest.mark.parametrize("entry", ["metrics", "spec", "parameters"])
@pytest.mark.parametrize(("levels", "width"), [(28, 2), (100, 1)])
def test_lists_without_end_are_refused_at_once(model_file, tmp_path, entry, levels, width):
    path = rewritten(
        model_file, tmp_path / "m.pt", lambda d: d[entry].update(x=nested(levels, width))
    )
    with pytest.raises(InputError, match=r"more than 1000000 values|nested deeper|is list, expect"):
        read_model(path)


@pytest.mark.parametrize("entry", ["format", "format_version", "sha256", "spec", "other"])
def test_an_entry_of_lists_without_end_is_not_even_printed(model_file, tmp_path, entry):
    path = rewritten(model_file, tmp_path / "m.pt", lambda d: d.update({entry: nested(28, 2)}))
    with pytest.raises(InputError, match=r"m\.pt: .{1,300}$"):
        read_model(path)


def test_a_key_that_is_never_hashed_to_its_end_is_refused_at_once(model_file, tmp_path):
    """A pickle of 300 bytes has a tuple as a key: each of 60 levels holds the one before twice."""
    doubled = b"".join(b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(60))
    pickled = b"\x80\x02}K\x01K\x01\x86q\x000" + doubled + b"h\x3cK\x01s."
    with zipfile.ZipFile(model_file) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for member in old.infolist():
            pickle_of_it = member.filename.endswith("data.pkl")
            new.writestr(member.filename, pickled if pickle_of_it else old.read(member))
    with pytest.raises(InputError, match="a tuple of more than 1000000 values"):
        read_model(tmp_path / "m.pt")


def test_data_that_claim_more_than_the_file_holds_are_refused(model_file, tmp_path):
    def huge(data):
        data["parameters"]["encoder.dense.bias"] = torch.zeros(1).expand(2**40)

    with pytest.raises(InputError, match="claim to be larger than the file"):
        read_model(rewritten(model_file, tmp_path / "m.pt", huge))
    packed = tmp_path / "z.pt"
    with zipfile.ZipFile(model_file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(InputError, match="its data are compressed"):
        read_model(packed)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken", b"\x80\x02."])
def test_bytes_that_are_no_model_are_refused(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.pt: .*not a model file"):
        read_model(tmp_path / "m.pt")


def test_a_cut_file_and_a_bare_tensor_are_refused(model_file, tmp_path):
    content = model_file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name in ("cut.pt", "tensor.pt"):
        with pytest.raises(InputError, match="not a model file"):
            read_model(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"m\.pt: No such file"):
        read_model(tmp_path / "m.pt")


def test_a_model_whose_parameters_do_not_fit_cannot_be_made(model):
    with pytest.raises(ValueError, match="parameters missing"):
        Model(model.spec, {})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    write_file(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_link_is_followed_and_a_device_refused(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MachineError, match="pipe: is not a regular file"):
        require_writable(tmp_path / "pipe")


def test_a_place_that_cannot_be_written_is_known_before_anything_is(tmp_path):
    require_writable(tmp_path / "m.pt")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(
        MachineError, match=r"nowhere/m\.pt: cannot be written: No such file or directory"
    ):
        require_writable(tmp_path / "nowhere" / "m.pt")
    with pytest.raises(MachineError, match="is a folder; name a file"):
        require_writable(tmp_path)
