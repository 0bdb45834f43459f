"""``vqdeploy import``: other people's checkpoints give upstream's numbers, or one line of error."""

import argparse
import hashlib
import json
import re
import shutil
import struct
import sys
import tomllib
import types
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, Trap, small_model
from upstream import LlamaGen, PytorchVqVae, SonnetLike, settled
from vqgans import FOLDER, arrays

import vqref
from vqdeploy.importers import import_model
from vqdeploy.importers.plan import Choices
from vqdeploy.importers.taming import NAMES
from vqdeploy.sources import read_source, write_model
from vqref import families
from vqref.errors import InputError, UsageError
from vqref.modelfile import Model
from vqref.spec import CODEBOOK, EMA_COUNT, EMA_MEANS
from vqtrain.modelfile import read_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
GOLDEN = {"diffusers_small": "diffusers_small", "taming_small": "taming_small.ckpt"}
"""The checkpoint of each golden case."""

FLOAT64 = 1e-12
"""Share of the scale: for two orders of summation in float64, through about 60 rows."""

FLOAT32 = 1e-4
"""Share of the scale: the error of a runtime in float32; upstream's own is up to 7e-6."""

DOCUMENT = (ROOT / "docs" / "importing.md").read_text()
MAPPINGS = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
"""Mappings of pytorch-vq-vae, and of Sonnet."""


@pytest.fixture
def checkpoint(tmp_path):
    """Makes copies of the golden checkpoints, which a test may change."""
    shutil.copytree(FOLDER, tmp_path / "golden")
    return lambda case: tmp_path / "golden" / GOLDEN[case]


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def agrees(model, images, latents, indices, outputs, side):
    """Requires that the oracle gives the golden latents, indices and outputs."""
    found = vqref.encode(model.spec, model.params, images)
    close(found, latents, FLOAT64)
    codebook = model.params[CODEBOOK].astype(np.float64)
    np.testing.assert_array_equal(vqref.quantize(found, codebook).indices, indices)
    close(vqref.decode(model.spec, model.params, codebook[indices]), outputs, FLOAT64)
    assert model.spec.latent_shape == (side, side)


@pytest.mark.parametrize("case", GOLDEN)
def test_a_golden_checkpoint_gives_the_numbers_of_upstream(case):
    golden = arrays(case)
    model = import_model(FOLDER / GOLDEN[case], Choices()).model
    agrees(
        model,
        golden["images"],
        golden["latents"],
        golden["indices"],
        golden["reconstructions"],
        16,
    )


def test_a_tensor_that_no_output_shows_is_in_its_place():
    """If groups have one channel, a norm removes what the bias before it adds."""
    theirs = torch.load(FOLDER / "taming_small.ckpt", weights_only=True)["state_dict"]
    params = import_model(FOLDER / "taming_small.ckpt", Choices()).model.params
    for ours, name in {
        "encoder.level1.block1.conv1.bias": "encoder.down.0.block.0.conv1.bias",
        "decoder.level1.block1.conv1.bias": "decoder.up.0.block.0.conv1.bias",
        "decoder.level1.block1.conv2.bias": "decoder.up.0.block.0.conv2.bias",
        "decoder.level1.block2.conv1.bias": "decoder.up.0.block.1.conv1.bias",
        "decoder.level1.block2.conv2.bias": "decoder.up.0.block.1.conv2.bias",
        "decoder.level1.block1.shortcut.bias": "decoder.up.0.block.0.nin_shortcut.bias",
        "encoder.middle.attention.key.bias": "encoder.mid.attn_1.k.bias",
        "decoder.level2.attention2.key.bias": "decoder.up.1.attn.1.k.bias",
    }.items():
        np.testing.assert_array_equal(params[ours], theirs[name].numpy())


@pytest.mark.parametrize("case", GOLDEN)
def test_imported_exported_and_run_it_gives_the_tokens_of_upstream(case, run, tmp_path):
    golden = arrays(case)
    done = run("-m", "vqdeploy", "import", FOLDER / GOLDEN[case])
    assert done.returncode == 0, done.stderr
    file = FOLDER / GOLDEN[case] / WEIGHTS if case == "diffusers_small" else FOLDER / GOLDEN[case]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for said in (digest, "16×16 of 64 codes", "next: python -m vqdeploy export model.pt"):
        assert said in done.stdout
    assert read_model(tmp_path / "model.pt").provenance["imported"]["sha256"] == digest

    np.save(tmp_path / "images.npy", golden["images"])
    words = ("export", "model.pt", "--data", "images.npy")
    done = run("-m", "vqdeploy", *words)
    assert done.returncode == 0, done.stderr
    assert digest in (tmp_path / "model-onnx" / "README.md").read_text()

    done = run("-m", "vqdeploy", "inspect", "model-onnx")
    assert (
        f"imported    from {file.name} ({case.partition('_')[0]}), sha256 {digest}" in done.stdout
    )

    def answer(stage, array):
        graph = tmp_path / "model-onnx" / f"{stage}.onnx"
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        return session.run(None, {session.get_inputs()[0].name: array})[0]

    close(answer("encoder", golden["images"]), golden["latents"], FLOAT32)
    np.testing.assert_array_equal(answer("tokenizer", golden["images"]), golden["indices"])
    rows = golden["quantized"].astype(np.float32)
    close(answer("decoder", rows), golden["reconstructions"], FLOAT32)


def safetensors_changed(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def pickle_changed(path, change):
    data = torch.load(path, weights_only=True)
    change(data["state_dict"])
    torch.save(data, path)


def changed(checkpoint, case, change):
    """Returns the checkpoint of a case with its tensors changed."""
    path = checkpoint(case)
    (safetensors_changed if path.is_dir() else pickle_changed)(path, change)
    return path


BIAS = {
    "diffusers_small": "decoder.conv_in.bias",
    "taming_small": "decoder.up.0.block.0.conv1.bias",
}
CODES_OF = "quantize.embedding.weight"

TENSORS = {
    "missing": (lambda t, n: t.pop(n), r"lacks {}"),
    "extra": (lambda t, n: t.update({f"{n}2": t[n].clone()}), r"does not have: {}2"),
    "another shape": (lambda t, n: t.update({n: t[n][1:].clone()}), r"{} has shape \(\d+,\), exp"),
    "another order of axes": (
        lambda t, n: t.update({CODES_OF: t[CODES_OF].T.contiguous()}),
        r"quantize.embedding.weight has shape \(\d, 64\), expected \(64, \d\)",
    ),
    "integers": (lambda t, n: t.update({n: t[n].long()}), r"{} is int64, expected floating"),
    "not a number": (lambda t, n: t[n][1:2].fill_(np.nan), r"{} holds nan at \(1,\)"),
    "too large": (lambda t, n: t.update({n: t[n].double() * 1e200}), r"{} holds numbers that flo"),
}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_other_than_expected_is_named(checkpoint, case, kind):
    change, message = TENSORS[kind]
    path = changed(checkpoint, case, lambda tensors: change(tensors, BIAS[case]))
    with pytest.raises(InputError, match=message.replace("{}", re.escape(BIAS[case]))) as caught:
        import_model(path, Choices())
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", GOLDEN)
def test_another_precision_is_converted_and_said(checkpoint, case, dtype):
    def convert(tensors):
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)

    found = import_model(changed(checkpoint, case, convert), Choices())
    count = {"diffusers_small": 125, "taming_small": 155}[case]
    assert f"converted {count} tensors of {str(dtype)[6:]}" in found.said
    exact = import_model(FOLDER / GOLDEN[case], Choices()).model.params
    for name, array in found.model.params.items():
        assert array.dtype == np.float32
        rounded = torch.from_numpy(exact[name]).to(dtype).float().numpy()
        np.testing.assert_array_equal(array, rounded)


def test_one_flipped_bit_of_any_tensor_in_an_archive_is_refused(checkpoint):
    """Records of an archive have checksums, which PyTorch ignores; safetensors have none."""
    path = checkpoint("taming_small")
    content = path.read_bytes()
    tensors = torch.load(path, weights_only=True)["state_dict"]
    rng = np.random.default_rng(0)
    for tensor in tensors.values():
        data, bit = tensor.numpy().tobytes(), int(rng.integers(2**20))
        if len(data) < 64:  # such bytes may be elsewhere in the file, too
            continue
        damaged = bytearray(content)
        damaged[content.index(data) + bit % len(data)] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged: the checksum of \S+/data/\d+ does not"):
            import_model(path, Choices())


@pytest.mark.parametrize("case", GOLDEN)
def test_one_changed_number_is_known_by_the_digest_alone(checkpoint, case):
    path = changed(checkpoint, case, lambda tensors: tensors[BIAS[case]][0].add_(1e-6))
    file = path / WEIGHTS if path.is_dir() else path
    import_model(path, Choices(), hashlib.sha256(file.read_bytes()).hexdigest().upper())
    original = import_model(FOLDER / GOLDEN[case], Choices()).checkpoint.sha256
    with pytest.raises(InputError, match=f"sha256 is [0-9a-f]{{64}}, expected {original}"):
        import_model(path, Choices(), original)


DIFFUSERS = {
    "_class_name": ("AutoencoderKL", "expected 'VQModel'"),
    "norm_type": ("spatial", "expected 'group'"),
    "act_fn": ("gelu", "expected 'silu' or 'swish'"),
    "layers_per_block": (2, "lacks encoder.down_blocks.0.resnets.1.norm1.weight"),
    "block_out_channels": ([32, 48], r"expected multiples of the first"),
    "norm_num_groups": (7, "groups is 7; it must divide"),
    "num_vq_embeddings": (65, r"embedding.weight has shape \(64, 4\), expected \(65, 4\)"),
    "vq_embed_dim": (5, r"embedding.weight has shape \(64, 4\), expected \(64, 5\)"),
    "latent_channels": (8, r"encoder.conv_out.weight has shape \(4, 64, 3, 3\), expected \(8, 64"),
    "out_channels": (1, "expected 3"),
    "mid_block_add_attention": (False, r"does not have: \w+.mid_block.attentions.0"),
    "down_block_types": (["DownEncoderBlock2D", "SkipDownBlock2D"], "expected 2 of DownEncoder"),
    "up_block_types": (["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], "attention at the levels of"),
    "sample_size": (31, "must be divisible by 2"),
    "in_channels": ("3", "expected an integer from 0"),
    "twist": (1, "expected no such field"),
}


@pytest.mark.parametrize("field", DIFFUSERS)
def test_a_field_of_diffusers_that_does_not_fit_is_named(checkpoint, field):
    value, message = DIFFUSERS[field]
    path = checkpoint("diffusers_small") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message) as caught:
        import_model(path.parent, Choices())
    assert "\n" not in str(caught.value)


TAMING = {
    "target: taming.models.vqgan.VQModel": ("target: taming.models.vqgan.GumbelVQ", "GumbelVQ"),
    "target: taming.models": ("target: others.models", "model.target is 'others.models.vqgan.VQ"),
    "double_z: false": ("double_z: true", "ddconfig.double_z is True, expected False"),
    "dropout: 0.0": ("resamp_with_conv: false", "ddconfig.resamp_with_conv is False, exp"),
    "embed_dim: 8": ("embed_dim: 8\n    remap: used.npy", "params.remap is 'used.npy', expected"),
    "n_embed: 64": ("n_embed: 32", r"embedding.weight has shape \(64, 8\), expected \(32, 8\)"),
    "ch: 32": ("ch: 64", r"encoder.conv_in.weight has shape \(32, 3, 3, 3\), expected \(64, 3"),
    "ch_mult: [1, 2]": ("ch_mult: [1, 0]", "ch_mult is .1, 0., expected a list"),
    "attn_resolutions: [16]": ("attn_resolutions: [8]", "attn_resolutions is .8., expected some"),
    "num_res_blocks: 1": ("num_res_blocks: 1000000000", "expected an integer from 0 to 64"),
    "z_channels: 16": ("z_channel: 16", "z_channels is missing, expected a value"),
    "    embed_dim": ("  \tembed_dim", "not a configuration: "),
    "params: {": ("params: &a {b: *a, ", r"holds an alias \(\*name\)"),
}


@pytest.mark.parametrize("line", TAMING)
def test_a_line_of_taming_that_does_not_fit_is_named(checkpoint, line):
    other, message = TAMING[line]
    path = checkpoint("taming_small").with_suffix(".yaml")
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, other))
    with pytest.raises(InputError, match=message) as caught:
        import_model(checkpoint("taming_small"), Choices())
    assert "\n" not in str(caught.value)


def test_attention_stays_in_its_level_whatever_the_size_of_the_images():
    found = import_model(FOLDER / "taming_small.ckpt", Choices(image_size=64)).model
    same = import_model(FOLDER / "taming_small.ckpt", Choices()).model
    assert found.spec.latent_shape == (32, 32)
    assert [row.name for row in found.spec.layers] == [row.name for row in same.spec.layers]


def test_images_of_diffusers_may_be_in_the_unit_interval():
    found = import_model(FOLDER / "diffusers_small", Choices(value_range=(0.0, 1.0)))
    spec, params = found.model.spec, found.model.params
    assert spec.value_range == (0, 1)
    assert "images in [0, 1]" in found.said
    other = import_model(FOLDER / "diffusers_small", Choices())
    assert "the configuration does not say" in other.said[0]
    images = arrays("diffusers_small")["images"].astype(np.float64)
    latents = vqref.encode(other.model.spec, params, (images + 1) / 2)
    close(vqref.encode(spec, params, images), latents, FLOAT64)


OLD_WORDS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_the_old_names_of_attention_are_read(checkpoint):
    def rename(tensors):
        for new, old in OLD_WORDS.items():
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(f".{new}.", f".{old}.")] = tensors.pop(name)

    found = import_model(changed(checkpoint, "diffusers_small", rename), Choices()).model.params
    exact = import_model(FOLDER / "diffusers_small", Choices()).model.params
    for name, array in found.items():
        np.testing.assert_array_equal(array, exact[name])


def test_a_file_is_known_by_its_content_and_not_by_its_name(checkpoint, tmp_path):
    shutil.copy(FOLDER / "diffusers_small" / WEIGHTS, tmp_path / "taming.ckpt")
    config = Choices(config=FOLDER / "diffusers_small" / "config.json")
    assert import_model(tmp_path / "taming.ckpt", config).importer.name == "diffusers"
    with pytest.raises(InputError, match="no configuration beside it; name it with --config FILE"):
        import_model(tmp_path / "taming.ckpt", Choices())
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"its tensors are a\.weight, …: none of .*--mapping FILE"):
        import_model(tmp_path / "other.pt", Choices())
    write_model(tmp_path / "model.pt", small_model(families.post(base_depth=2)))
    with pytest.raises(InputError, match=r"is a model\.pt already; export takes it"):
        import_model(tmp_path / "model.pt", Choices())


def test_a_choice_that_a_checkpoint_has_no_use_for_is_refused():
    with pytest.raises(UsageError, match="--range does not apply to VQModel of taming-transform"):
        import_model(FOLDER / "taming_small.ckpt", Choices(value_range=(0.0, 1.0)))


def hostile(kind, path):
    """Writes a file to ``path`` that claims or asks for what it must not get."""
    good = (FOLDER / "diffusers_small" / WEIGHTS).read_bytes()
    size = int.from_bytes(good[:8], "little")
    if kind == "a pickle that acts":
        torch.save({"state_dict": {"w": Trap(path.with_name("touched"))}}, path)
    elif kind == "tensors of terabytes":
        data = torch.load(FOLDER / "taming_small.ckpt", weights_only=True)
        data["state_dict"]["quantize.embedding.weight"] = torch.zeros(1).expand(64, 8)
        data["state_dict"]["decoder.conv_in.bias"] = torch.zeros(1).expand(2**40)
        torch.save(data, path)
    elif kind == "an old pickle":
        torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    elif kind == "a cut archive":
        path.write_bytes((FOLDER / "taming_small.ckpt").read_bytes()[:-100])
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "note": "none"}, path)
    elif kind == "cut safetensors":
        path.write_bytes(good[:-4])
    elif kind == "a header of exabytes":
        path.write_bytes(struct.pack("<Q", 2**60) + good[8:])
    elif kind == "safetensors of 2 GiB":
        header = {"w": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    elif kind == "a shape that overflows":
        header = {"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    elif kind == "no JSON":
        path.write_bytes(good[:9] + b"}" * (size - 1) + good[8 + size :])


HOSTILE = {
    "a pickle that acts": r"refused: holds \w+\.system, which is not data; nothing was executed",
    "tensors of terabytes": r"decoder\.conv_in\.bias has shape \(1099511627776,\), exp",
    "an old pickle": r"neither safetensors, \.npz nor a file of torch\.save since PyTorch 1\.6",
    "a cut archive": "not a checkpoint: ",
    "a list": "holds list, expected tensors by their names",
    "no tensors": "holds no tensors; its entries are epoch, note",
    "cut safetensors": "not a safetensors file: ",
    "a header of exabytes": "not a safetensors file: ",
    "safetensors of 2 GiB": "not a safetensors file: ",
    "a shape that overflows": "not a safetensors file: ",
    "no JSON": "not a safetensors file: ",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_line_and_nothing_is_executed(tmp_path, kind):
    path = tmp_path / "taming_small.ckpt"
    shutil.copy(FOLDER / "taming_small.yaml", tmp_path)
    hostile(kind, path)
    with pytest.raises(InputError, match=HOSTILE[kind]) as caught:
        import_model(path, Choices())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


def test_tensors_of_the_right_shapes_that_are_larger_than_the_file_take_no_memory(tmp_path):
    """A network has large sizes, and each of its tensors is one number, stretched."""
    tensors = {"encoder.down.0.block.0.norm1.weight": torch.zeros(1).expand(2**20)}
    text = (FOLDER / "taming_small.yaml").read_text().replace("ch: 32", f"ch: {2**20}")
    (tmp_path / "m.yaml").write_text(text)
    spec = families.vqgan(
        (3, 32, 32), 2**20, (1, 2), 1, (16,), latent_channels=16, num_codes=64, code_size=8
    )
    for ours, source in NAMES.sources(spec, 2).items():
        shape = next(p.shape for p in spec.parameters if p.name == ours)
        tensors[source.name] = torch.zeros(1).expand(source.shape(shape))
    torch.save({"state_dict": tensors}, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match="its tensors claim to be larger than the file"):
        import_model(tmp_path / "m.ckpt", Choices())


def test_a_class_that_lightning_left_behind_is_not_needed(checkpoint):
    """In old checkpoints, a key is the class itself; here it is as in a pickle."""
    path = checkpoint("taming_small")
    data = torch.load(path, weights_only=True)
    name = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    stand_in = type("ModelCheckpoint", (), {"__module__": name.rpartition(".")[0]})
    modules = {}
    for end in range(1, 4):
        part = ".".join(name.split(".")[:end])
        modules[part] = types.ModuleType(part)
    vars(modules[name.rpartition(".")[0]])["ModelCheckpoint"] = stand_in
    sys.modules.update(modules)
    try:
        torch.save({**data, "callbacks": {stand_in: {"best": 1}}}, path)
    finally:
        for part in modules:
            del sys.modules[part]
    assert import_model(path, Choices()).importer.name == "taming"


@pytest.fixture(scope="module")
def images():
    return arrays("taming_small")["images"]


def tokens(latents, codebook):
    """Returns the nearest of rows (K, D) to latents (N, S, D), by the matrix of all differences."""
    return ((latents[:, :, None] - codebook) ** 2).sum(-1).argmin(-1)


@pytest.mark.parametrize("unit", [True, False])
@torch.no_grad()
def test_llamagen_is_read_off_its_weights(tmp_path, images, unit):
    upstream = settled(LlamaGen())
    state = {name: tensor.float() for name, tensor in upstream.state_dict().items()}
    torch.save({"model": state}, tmp_path / "vq.pt")
    config = {"codebook_l2_norm": unit, "codebook_size": 32, "encoder_ch_mult": [1, 2]}
    (tmp_path / "vq.json").write_text(json.dumps(config))
    found = import_model(tmp_path / "vq.pt", Choices(image_size=32))
    assert found.said == ("took the tensors model", "left out quantize.codebook_used, 1 tensor")
    model = found.model
    assert model.spec.normalized == unit
    inputs = torch.from_numpy(images).double()
    latents = upstream.latents(inputs, unit)
    rows = model.params[CODEBOOK]
    if unit:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-7)
    else:
        np.testing.assert_array_equal(rows, state["quantize.embedding.weight"])
    np.testing.assert_array_equal(model.params[EMA_MEANS], rows)
    indices = tokens(latents.numpy(), rows.astype(np.float64))
    outputs = upstream.outputs(torch.from_numpy(indices), unit, 16).numpy()
    close(vqref.encode(model.spec, model.params, images), latents.numpy(), FLOAT64)
    found_indices = vqref.quantize(latents.numpy(), rows.astype(np.float64)).indices
    np.testing.assert_array_equal(found_indices, indices)
    rounding = 1e-6 if unit else FLOAT64  # rounding of unit rows to float32
    close(vqref.decode(model.spec, model.params, rows[indices].astype(float)), outputs, rounding)


def llamagen(path, change=lambda data: None, **config):
    """Returns a file of LlamaGen's trainer, whose averages differ from its weights."""
    states = [settled(LlamaGen(), seed).float().state_dict() for seed in (0, 1)]
    data = {
        "model": states[0],
        "ema": states[1],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "steps": 3,
        "args": argparse.Namespace(image_size=32, codebook_l2_norm=True, lr=1e-4),
    }
    change(data)
    torch.save(data, path)
    if config:
        path.with_suffix(".json").write_text(json.dumps(config))


@pytest.mark.parametrize("weights", [None, "ema", "model"])
def test_a_trainers_file_of_llamagen_says_its_options_and_holds_two_networks(tmp_path, weights):
    llamagen(tmp_path / "vq.pt")
    found = import_model(tmp_path / "vq.pt", Choices(weights=weights))
    entry = weights or "ema"
    state = torch.load(tmp_path / "vq.pt", weights_only=False)[entry]
    assert f"took the tensors {entry}" in found.said
    name = "encoder.conv_in.weight"
    np.testing.assert_array_equal(found.model.params[name], state[name])
    assert found.model.spec.image_shape == (3, 32, 32)


CONV2 = "encoder.conv_blocks.1.res.0.conv2.weight"

LLAMAGEN: dict[str, Any] = {
    "no size": (lambda d: d.pop("args"), {"codebook_l2_norm": True}, "--image-size N"),
    "no norm": (lambda d: delattr(d["args"], "codebook_l2_norm"), {}, "does not say codebook_l2_n"),
    "another K": (None, {"codebook_size": 64}, "codebook_size is 64, expected 32"),
    "another D": (None, {"codebook_embed_dim": 8}, "codebook_embed_dim is 8, expected 4"),
    "other levels": (None, {"decoder_ch_mult": [1, 2, 2]}, r"decoder_ch_mult is \[1, 2, 2\], exp"),
    "an unknown field": (None, {"twist": True}, "twist is True, expected no such field"),
    "no codebook": (
        lambda d: d["ema"].pop("quantize.embedding.weight"),
        {},
        "lacks quantize.embedding.weight",
    ),
    "a width that is no multiple": (
        lambda d: d["ema"].update({CONV2: torch.ones(33, 1, 1, 1)}),
        {},
        "conv2.weight has 33 channels, expected a multiple of 32",
    ),
    "a number in a tensor's place": (
        lambda d: d["ema"].update({"encoder.conv_in.weight": 3}),
        {},
        r"encoder.conv_in.weight has shape \(\), expected 4 axes",
    ),
}


@pytest.mark.parametrize("kind", LLAMAGEN)
def test_a_file_of_llamagen_that_does_not_fit_is_named(tmp_path, kind):
    change, config, message = LLAMAGEN[kind]
    said = {"codebook_l2_norm": True, **config} if config else {}
    llamagen(tmp_path / "vq.pt", change or (lambda data: None), **said)
    with pytest.raises(InputError, match=message):
        import_model(tmp_path / "vq.pt", Choices())


def test_weights_that_a_file_lacks_are_named(tmp_path):
    llamagen(tmp_path / "vq.pt", lambda data: data.pop("ema"))
    with pytest.raises(InputError, match="has no network ema; it has model"):
        import_model(tmp_path / "vq.pt", Choices(weights="ema"))


@torch.no_grad()
def test_pytorch_vq_vae_is_imported_by_the_mapping_of_the_document(tmp_path, images):
    """The first ReLU of a block is in place; without that line, the numbers would differ."""
    upstream = settled(PytorchVqVae(128, 32, 2, 512, 64))
    upstream._vq_vae._ema_cluster_size.abs_()
    state = {name: tensor.float() for name, tensor in upstream.state_dict().items()}
    torch.save(state, tmp_path / "vq.pt")
    (tmp_path / "names.toml").write_text(MAPPINGS[0])
    model = import_model(tmp_path / "vq.pt", Choices(mapping=tmp_path / "names.toml")).model
    inputs = torch.from_numpy(images).double()
    latents = upstream.latents(inputs).numpy()
    indices = tokens(latents, state["_vq_vae._embedding.weight"].double().numpy())
    outputs = upstream.outputs(torch.from_numpy(indices), 8).numpy()
    agrees(model, images, latents, indices, outputs, 8)
    for name, theirs in ((EMA_COUNT, "_vq_vae._ema_cluster_size"), (EMA_MEANS, "_vq_vae._ema_w")):
        np.testing.assert_array_equal(model.params[name], state[theirs])

    (tmp_path / "names.toml").write_text(MAPPINGS[0].replace("relu_in_place = true", ""))
    other = import_model(tmp_path / "vq.pt", Choices(mapping=tmp_path / "names.toml")).model
    assert np.abs(vqref.encode(other.spec, other.params, images) - latents).max() > 0.01


def test_sonnet_is_imported_by_the_mapping_of_the_document(tmp_path, images):
    upstream = SonnetLike(128, 32, 2, 512, 64)
    np.savez(tmp_path / "vq.npz", **upstream.variables)
    (tmp_path / "names.toml").write_text(MAPPINGS[1])
    model = import_model(tmp_path / "vq.npz", Choices(mapping=tmp_path / "names.toml")).model
    latents = upstream.latents(torch.from_numpy(images).double()).numpy()
    indices = tokens(latents, upstream.variables["vq/embeddings"].T.astype(np.float64))
    outputs = upstream.outputs(torch.from_numpy(indices), 8).numpy()
    agrees(model, images, latents, indices, outputs, 8)
    np.testing.assert_array_equal(model.params[EMA_MEANS], upstream.variables["ema_dw/hidden"].T)


MAPPED = {
    "hidden = 128": ("hidden = 127", "describes no network of ours: hidden is 127; it must be ev"),
    'family = "residual"': ('family = "other"', "network.family is 'other', expected 'post' or"),
    "blocks = 2": ("blocks = 3", "lacks _encoder._residual_stack._layers.2._block.1.weight"),
    "num_codes = 512": ("num_codes = 5", r"embedding.weight has shape \(512, 64\), expected \(5,"),
    "-0.5, 0.5": ("-1e30, 0.5", "scale is 1e.30; it must be a number within"),
    "[-0.5, 0.5]": ("[0.5, -0.5]", "network.range is .*, expected two numbers, the lower first"),
    '= "encoder.to_latents"': ('= "encoder.to_latent"', "expected the name of a row or parameter"),
    '= "decoder.up2"': ('= "decoder.up1"', "decoder.up1.weight, which is already mapped"),
    '"_pre_vq_conv" = "encoder.to_latents"': ("", "no tensor is given for encoder.to_latents.wei"),
    '"_decoder._conv_trans_1"': ('"_decoder._conv_trans_2x"', "lacks _decoder._conv_trans_2x.wei"),
    '"_decoder._conv_1"': ('"_encoder._conv_3"', "Cannot overwrite a value"),
    'zeros = ["*.block*.conv?.bias"]': ('zeros = ["none"]', "none is like none"),
    '"quantizer.codebook"': (
        '{name = "quantizer.codebook", axes = [0, 2]}',
        r"axes \(0, 2\) are not those of \(512, 64\)",
    ),
    "\n[network]": ('entry = "ema"\n[network]', "entry is 'ema', expected one of"),
}


@pytest.mark.parametrize("line", MAPPED)
def test_a_line_of_a_mapping_that_does_not_fit_is_named(tmp_path, line):
    other, message = MAPPED[line]
    torch.save(PytorchVqVae(128, 32, 2, 512, 64).state_dict(), tmp_path / "vq.pt")
    assert line in MAPPINGS[0]
    (tmp_path / "names.toml").write_text(MAPPINGS[0].replace(line, other))
    with pytest.raises(InputError, match=message):
        import_model(tmp_path / "vq.pt", Choices(mapping=tmp_path / "names.toml"))


def test_one_tensor_of_theirs_is_not_two_of_ours(tmp_path):
    mapping = MAPPINGS[0].replace("_layers.{i}._block.1", "_layers.0._block.1")
    torch.save(PytorchVqVae(128, 32, 2, 512, 64).state_dict(), tmp_path / "vq.pt")
    (tmp_path / "names.toml").write_text(mapping)
    with pytest.raises(InputError, match="used more than once: _encoder"):
        import_model(tmp_path / "vq.pt", Choices(mapping=tmp_path / "names.toml"))


def test_the_mappings_of_the_document_are_two_and_whole():
    assert [tomllib.loads(text)["network"]["family"] for text in MAPPINGS] == ["residual"] * 2


CODES = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)


def book(prefix="", **changes):
    """Returns the state dict of a vector-quantize-pytorch quantizer of 24 codes."""
    codes = torch.from_numpy(CODES)[None]
    found = {
        f"{prefix}_codebook.initted": torch.tensor(True),
        f"{prefix}_codebook.cluster_size": torch.full((1, 24), 2.0),
        f"{prefix}_codebook.embed_avg": 2 * codes,
        f"{prefix}_codebook.embed": codes,
    }
    return {**found, **{name.replace("__", "."): value for name, value in changes.items()}}


@pytest.fixture
def residual(residual_model, tmp_path):
    """Choices with a model of family residual, whose code_size is 8."""
    write_model(tmp_path / "model.pt", residual_model)
    return Choices(model=tmp_path / "model.pt")


@pytest.mark.parametrize("prefix", ["", "vq."])
def test_a_codebook_takes_the_place_of_the_models(residual, residual_model, tmp_path, prefix):
    more = {"encoder.weight": torch.zeros(3)} if prefix else {}
    torch.save({**book(prefix), **more}, tmp_path / "codebook.pt")
    found = import_model(tmp_path / "codebook.pt", residual)
    model = found.model
    assert model.spec.num_codes == 24
    np.testing.assert_array_equal(model.params[CODEBOOK], CODES)
    np.testing.assert_array_equal(model.params[EMA_COUNT], np.full(24, 2))
    np.testing.assert_array_equal(model.params[EMA_MEANS], 2 * CODES)
    for row in model.spec.layers:
        for name, _ in row.parameters:
            np.testing.assert_array_equal(model.params[name], residual_model.params[name])
    assert ("left out 1 tensors that are not of vq." in found.said) == bool(prefix)
    write_model(tmp_path / "new.pt", model)
    assert read_source(tmp_path / "new.pt")[0].provenance["data"]["source"] == "test"


def test_the_codebook_of_the_library_itself_is_read(residual, tmp_path):
    peers = pytest.importorskip("vector_quantize_pytorch", reason="needs the extra peers")
    quantizer = peers.VectorQuantize(dim=8, codebook_size=24)
    quantizer.train()(torch.randn(2, 30, 8))
    torch.save(quantizer.state_dict(), tmp_path / "codebook.pt")
    model = import_model(tmp_path / "codebook.pt", residual).model
    np.testing.assert_array_equal(model.params[CODEBOOK], quantizer.codebook.detach())


BOOKS = {
    "of another size": (
        lambda b: b.update({"_codebook.embed": torch.zeros(1, 24, 7)}),
        r"_codebook.embed has shape \(1, 24, 7\), expected \(1, K, 8\)",
    ),
    "of two heads": (
        lambda b: b.update({"_codebook.embed": torch.zeros(2, 24, 8)}),
        r"_codebook.embed has shape \(2, 24, 8\)",
    ),
    "two": (lambda b: b.update(book("layers.1.")), "holds 2 codebooks: _codebook.embed, layers.1"),
    "never initialised": (
        lambda b: b.update({"_codebook.initted": torch.tensor(False)}),
        "_codebook.initted is false",
    ),
    "of more codes than there can be": (
        lambda b: b.update({"_codebook.embed": torch.zeros(1).expand(1, 2**30, 8)}),
        "num_codes is 1073741824; it must be an integer from 1 to",
    ),
    "of an unclear beginning": (
        lambda b: b.update({"_codebook.initted": torch.tensor([True, False])}),
        "_codebook.initted is not true or false",
    ),
    "behind a projection": (
        lambda b: b.update({"project_in.weight": torch.zeros(8, 16)}),
        "does not have: project_in.weight",
    ),
    "of unit vectors": (
        lambda b: b["_codebook.embed"].div_(b["_codebook.embed"].norm(dim=-1, keepdim=True)),
        "the codes of _codebook.embed are unit vectors, but the latents of the network are not",
    ),
}


@pytest.mark.parametrize("kind", BOOKS)
def test_a_codebook_that_does_not_fit_is_named(residual, tmp_path, kind):
    change, message = BOOKS[kind]
    state = {name: tensor.clone() for name, tensor in book().items()}
    change(state)
    torch.save(state, tmp_path / "codebook.pt")
    with pytest.raises(InputError, match=message):
        import_model(tmp_path / "codebook.pt", residual)


def test_unit_vectors_are_for_normalised_latents_alone(tmp_path):
    sizes: dict[str, Any] = {
        "groups": 4,
        "latent_channels": 4,
        "num_codes": 8,
        "code_size": 8,
        "normalized": True,
    }
    spec = families.vqgan((3, 8, 8), 8, (1,), 1, (), **sizes)
    params = vqref.init_params(spec, np.random.default_rng(0))
    write_model(tmp_path / "model.pt", Model(spec, params))
    codes = torch.from_numpy(CODES)[None]
    torch.save({"_codebook.embed": codes}, tmp_path / "codebook.pt")
    choices = Choices(model=tmp_path / "model.pt")
    with pytest.raises(InputError, match="are not unit vectors, but the latents of the network ar"):
        import_model(tmp_path / "codebook.pt", choices)
    unit = codes / codes.norm(dim=-1, keepdim=True)
    torch.save({"_codebook.embed": unit}, tmp_path / "codebook.pt")
    model = import_model(tmp_path / "codebook.pt", choices).model
    np.testing.assert_array_equal(model.params[CODEBOOK], unit[0])


def test_a_codebook_without_a_network_is_a_matter_of_usage(tmp_path):
    torch.save(book(), tmp_path / "codebook.pt")
    with pytest.raises(UsageError, match="name the model that gets it: --model MODEL"):
        import_model(tmp_path / "codebook.pt", Choices())


def test_the_command_answers_in_one_line(refused, checkpoint, tmp_path):
    command = ("-m", "vqdeploy", "import")
    path = checkpoint("taming_small")
    assert "No such file" in refused(3, *command, "nothing.pt")
    assert "--digest is 'abc', expected 64" in refused(2, *command, path, "--digest", "abc")
    line = refused(3, *command, path, "--digest", "0" * 64)
    assert "sha256 is" in line
    line = refused(2, *command, path, "--output", path)
    assert "is a file to import; name another file" in line
    pickle_changed(path, lambda tensors: tensors.pop("quant_conv.bias"))
    assert line.count("\n") == 1
    assert "lacks quant_conv.bias" in refused(3, *command, path)
    assert not (tmp_path / "model.pt").exists()
