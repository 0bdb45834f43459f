"""Bundles that were changed and sealed again: they fit their own digests, and are still caught.

What they are, or what they answer, shows it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import add, sign, small_model, weight_changed

from vqdeploy import Codec
from vqdeploy.bundle import FACTS, Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.proof.certificate import read_certificate, write_certificate
from vqdeploy.proof.measure import check_kept
from vqdeploy.proof.samples import aimed_images
from vqdeploy.sealed import sealed, unsealed
from vqdeploy.verify import verify
from vqref import families
from vqref.errors import InputError
from vqtrain.modelfile import write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes the bundle of a small model once per kind. Tests forge copies."""
    place, kinds = tmp_path_factory.mktemp("made"), {}

    def make(kind: str, **options) -> Path:
        if kind not in kinds:
            spec = SPECS[kind.split(maxsplit=1)[0]]
            write_model(place / f"{kind}.pt", small_model(spec))
            kinds[kind] = place / kind
            export(place / f"{kind}.pt", kinds[kind], options=GraphOptions(**options))
        return kinds[kind]

    return make


SPECS = {
    "codes": families.post(base_depth=2, num_codes=256, code_size=4),
    "grid": families.residual((3, 16, 16), 16, 1, 8, num_codes=32, code_size=8, variance=0.08),
    "large": families.residual((1, 8, 8), 4, 1, 2, num_codes=1500, code_size=8, variance=0.08),
}
"""A table of 256 entries; a grid of 16 tokens; a codebook that is searched by products."""


@pytest.fixture
def forged(made, tmp_path):
    def copy(kind: str, **options) -> Path:
        return shutil.copytree(made(kind, **options), tmp_path / "forged")

    return copy


def failed(folder: Path) -> list[str]:
    """Seals a bundle again, and returns the stages at which it fails."""
    sign(folder)
    return [check.stage for check in verify(Bundle.open(folder), "cpu").report.failures]


def graph_changed(folder: Path, stage: str, change) -> None:
    found = onnx.load(folder / f"{stage}.onnx")
    change(found.graph)
    (folder / f"{stage}.onnx").write_bytes(found.SerializeToString(deterministic=True))


def test_codes_that_the_golden_batch_misses_cannot_be_permuted_in_the_tokenizer(forged):
    folder = forged("codes")
    oracle = Bundle.open(folder).oracle()
    seen = np.unique(oracle.golden["indices"])
    unseen = np.setdiff1d(np.arange(256), seen)
    assert len(unseen) > 200

    def permute(codebook):
        codebook[unseen] = codebook[np.roll(unseen, 1)]

    weight_changed(folder, "tokenizer", "quantizer.codebook", permute)
    assert "weights" in failed(folder)


@pytest.mark.parametrize("stage", ["tokenizer", "detokenizer"])
def test_a_composed_graph_with_one_other_bit_is_not_its_parts(forged, stage):
    folder = forged("grid")
    name = {"tokenizer": "encoder.conv.weight", "detokenizer": "decoder.conv.bias"}[stage]

    def nudge(array):
        array.flat[0] = np.nextafter(array.flat[0], np.float32(2))

    weight_changed(folder, stage, name, nudge)
    assert failed(folder) == ["weights"]


def test_a_composed_graph_with_another_node_is_not_its_parts(forged):
    folder = forged("grid")

    def insert(graph):
        for node in graph.node:
            for i, name in enumerate(node.input):
                if name == "latents":
                    node.input[i] = "moved"
        at = next(i for i, node in enumerate(graph.node) if "latents" in node.output) + 1
        graph.node.insert(at, onnx.helper.make_node("Relu", ["latents"], ["moved"], name="moved"))

    graph_changed(folder, "tokenizer", insert)
    assert "graphs" in failed(folder)


def test_a_node_that_does_not_fit_its_input_does_not_end_the_process(forged, run):
    """onnxruntime aborts on a kernel that is larger than its input."""
    folder = forged("grid")

    def enlarge(graph):
        node = next(node for node in graph.node if node.op_type == "Conv")
        for attribute in node.attribute:
            if attribute.name == "kernel_shape":
                attribute.ints[:] = [99, 99]
        name = node.input[1]
        tensor = next(t for t in graph.initializer if t.name == name)
        large = np.zeros((*tensor.dims[:2], 99, 99), np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(large, name))

    graph_changed(folder, "encoder", enlarge)
    assert failed(folder) == ["graphs", "weights"]
    done = run("-m", "vqdeploy", "verify", folder, "--device", "cpu", "--samples", 100)
    assert done.returncode == 4, done.stderr
    assert "on nothing: the graphs were not run" in done.stdout
    assert "NOT verified" in done.stdout
    assert read_certificate(folder / "certificate.json")["verdict"] == "refuted"


def test_a_branch_that_no_compared_image_takes_is_seen(forged):
    """Every latent changes if one pixel is above 0.99 and its neighbour is below."""
    folder = forged("grid")

    def branch(graph):
        for node in graph.node:
            if "latents" in node.output:
                node.name, node.output[:] = "own", ["own"]
        numbers = {"first": [0, 0, 0, 0], "second": [0, 0, 0, 1]}
        for name, place in numbers.items():
            indices = np.array(place, np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(indices, name))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.9, np.float32), "high"))
        nodes = [
            ("GatherND", ["images", "first"], "pixel"),
            ("GatherND", ["images", "second"], "neighbour"),
            ("Sub", ["pixel", "neighbour"], "contrast"),
            ("Greater", ["contrast", "high"], "chosen"),
            ("Exp", ["own"], "other"),
            ("Where", ["chosen", "other", "own"], "latents"),
        ]
        at = next(i for i, node in enumerate(graph.node) if "own" in node.output) + 1
        for i, (op, inputs, output) in enumerate(nodes):
            graph.node.insert(at + i, onnx.helper.make_node(op, inputs, [output], name=output))

    for stage in ("encoder", "tokenizer"):
        graph_changed(folder, stage, branch)
    assert failed(folder) == ["graphs"]


def test_a_value_of_int8_is_taken_back_by_the_step_that_rounded_it(forged):
    folder = forged("grid int8", precision="int8")

    def stretch(graph):
        node = [node for node in graph.node if node.op_type == "DequantizeLinear"][-1]
        tensor = next(t for t in graph.initializer if t.name == node.input[1])
        value = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
        graph.initializer.append(onnx.numpy_helper.from_array(value, "stretched"))
        node.input[1] = "stretched"

    for stage in ("encoder", "tokenizer"):
        graph_changed(folder, stage, stretch)
    assert "graphs" in failed(folder)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("encoder", "encoder.conv.weight"),
        ("decoder", "decoder.up2.bias"),
        ("quantizer", "quantizer.codebook"),
    ],
)
def test_a_part_with_one_other_bit_is_not_the_parameters(forged, stage, name):
    folder = forged("grid")

    def nudge(array):
        array.flat[0] = np.nextafter(array.flat[0], np.float32(2))

    weight_changed(folder, stage, name, nudge)
    assert "weights" in failed(folder)


@pytest.mark.parametrize("name", ["quantizer.codes", "quantizer.codes_0"])
def test_what_a_search_by_products_holds_follows_from_the_codebook(forged, name):
    folder = forged("large")

    def lose_a_code(array):
        code = array[777] if name == "quantizer.codes" else array[:, 777]
        code += 10

    for stage in ("quantizer", "tokenizer"):
        weight_changed(folder, stage, name, lose_a_code)
    assert {"weights", "codes"} <= set(failed(folder))


def test_every_entry_of_a_table_is_compared(forged):
    folder = forged("codes")

    def invert(table):
        table[25:] = 1 - table[25:]

    weight_changed(folder, "detokenizer", "table", invert)
    assert "table" in failed(folder)
    shutil.rmtree(folder)
    folder = forged("codes")
    weight_changed(folder, "detokenizer", "table", add((200, 0, 3, 3), 0.01))
    assert failed(folder) == ["table"]


def test_a_golden_batch_cannot_be_cut(forged):
    folder = forged("grid")
    with np.load(folder / "oracle.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    cut = {key: array[:4] if key.startswith("golden/") else array for key, array in arrays.items()}
    np.savez(folder / "oracle.npz", **cut)
    with pytest.raises(InputError, match="the golden batch has 4 images, not 32"):
        failed(folder)


def test_a_bundle_cannot_be_called_by_another_precision(forged):
    folder = forged("grid")
    sign(folder, lambda manifest: manifest.update(precision="int8"))
    assert "graphs" in failed(folder)
    shutil.rmtree(folder)
    folder = forged("grid int8", precision="int8")
    sign(folder, lambda manifest: manifest.update(precision="float16"))
    assert "graphs" in failed(folder)


def constant_tokens(folder: Path) -> None:
    """Gives every activation before the latents a step so coarse that all values become one."""

    def coarse(graph):
        node = [node for node in graph.node if node.op_type == "QuantizeLinear"][-1]
        tensor = next(t for t in graph.initializer if t.name == node.input[1])
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(1e30, np.float32), tensor.name))

    graph_changed(folder, "encoder", coarse)
    graph_changed(folder, "tokenizer", coarse)


def test_another_machine_may_lose_a_few_more_tokens_of_float16_than_the_export_did():
    exact = np.random.default_rng(0).integers(0, 512, (162, 64))

    def lost(count, precision):
        indices = exact.copy()
        indices.ravel()[:count] += 1
        recorded = {"tokens": exact.size, "equal": exact.size - 3}
        return check_kept(precision, indices, exact, recorded).violations

    assert lost(10, "float16") == 0  # what an H200 card lost
    assert lost(30, "float16") > 0
    assert lost(10, "int8") > 0


def test_networks_of_int8_must_keep_the_tokens_that_they_kept_at_export(forged):
    folder = forged("grid int8", precision="int8")
    kept = Bundle.open(folder).manifest["kept"]
    assert kept["tokens"] > 500
    assert verify(Bundle.open(folder), "cpu").report.passed
    constant_tokens(folder)
    assert "kept tokens" in failed(folder)
    sign(folder, lambda manifest: manifest["kept"].update(equal=0))
    assert "kept tokens" in failed(folder), "whatever the manifest says was kept"


def test_a_weight_of_int8_is_the_parameter_to_half_a_step(forged):
    folder = forged("grid int8", precision="int8")

    def step(array):
        array.flat[7] += 1 if array.flat[7] < 100 else -1

    for stage in ("encoder", "tokenizer"):
        weight_changed(folder, stage, "encoder.conv.weight_quantized", step)
    assert failed(folder) == ["weights"]


def test_the_aimed_images_have_codes_that_drawn_ones_miss():
    model = small_model(SPECS["codes"])
    images = aimed_images(model.spec, model.params)
    assert images.shape == (256, 1, 28, 28)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_bundle_that_is_wholly_made_anew_is_another_and_the_anchor_says_so(made, tmp_path):
    """Who makes everything anew can make it all fit. Only a digest from elsewhere tells."""
    honest = made("grid")
    write_model(tmp_path / "other.pt", small_model(SPECS["grid"], seed=1))
    export(tmp_path / "other.pt", tmp_path / "forged")
    assert verify(Bundle.open(tmp_path / "forged"), "cpu").report.passed
    anchor = hashlib.sha256((honest / "manifest.json").read_bytes()).hexdigest()
    assert Bundle.open(honest, anchor).sha256 == anchor
    Codec.load(honest, "cpu", manifest_sha256=anchor.upper()).close()
    for opened in (Bundle.open, lambda path, sha: Codec.load(path, manifest_sha256=sha)):
        with pytest.raises(InputError, match=f"its sha256 is [0-9a-f]{{64}}, not {anchor}"):
            opened(tmp_path / "forged", anchor)


def test_no_flipped_bit_of_any_file_of_a_bundle_passes(forged):
    folder, rng = forged("grid"), np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        bits = rng.integers(0, 8 * len(content), 400 if path.name == "manifest.json" else 20)
        for bit in map(int, bits):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(InputError, match=r"damaged|has no seal|not JSON|newer|version"):
                Bundle.open(folder).read(path.name)
        path.write_bytes(content)
    assert Bundle.open(folder).sha256


@pytest.mark.parametrize("name", FACTS)
def test_a_manifest_that_lacks_a_fact_is_refused_by_its_name(forged, name):
    def drop(manifest):
        *parts, last = name.split(".")
        for part in parts:
            manifest = manifest[part]
        del manifest[last]

    folder = forged("grid")
    sign(folder, drop)
    with pytest.raises(InputError, match=rf"damaged: lacks '{name.split('.')[-1]}'"):
        Bundle.open(folder)


@pytest.mark.parametrize("change", ["dtype", "shape", "foreign", "params"])
def test_arrays_of_the_oracle_file_have_their_dtypes_and_shapes(forged, change):
    folder = forged("grid")
    with np.load(folder / "oracle.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    match change:
        case "dtype":
            arrays["golden/gap"] = arrays["golden/gap"].astype("U8")
        case "shape":
            arrays["golden/indices"] = arrays["golden/indices"][:, :3]
        case "foreign":
            arrays["golden/more"] = np.zeros(3)
        case "params":
            arrays["param/encoder.conv.bias"] = arrays["param/encoder.conv.bias"].astype(np.float64)
    np.savez(folder / "oracle.npz", **arrays)
    with pytest.raises(InputError, match="the oracle file does not fit the manifest"):
        failed(folder)


def test_a_seal_is_of_the_bytes_and_what_was_sealed_comes_back():
    content = {"a": [1, 2.5, None, True], "b": {"ü": "x"}}
    written = sealed(content)
    assert unsealed(written) == content
    assert (
        json.loads(written)["sha256"]
        == hashlib.sha256(
            written.replace(json.loads(written)["sha256"].encode(), b"0" * 64)
        ).hexdigest()
    )
    for other in (written + b"\n", written.replace(b"2.5", b"2.50"), b"{}", b"[]", b""):
        with pytest.raises(ValueError, match=r"has no seal|damaged"):
            unsealed(other)
    with pytest.raises(ValueError, match="not JSON compliant"):
        sealed({"a": float("nan")})


def test_a_certificate_speaks_of_the_manifest_that_was_verified(forged, tmp_path):
    folder = forged("grid")
    bundle = Bundle.open(folder)
    found = verify(bundle, "cpu")
    sign(folder, lambda manifest: manifest["training"].update(epochs=99))
    write_certificate(tmp_path / "c.json", bundle, found, {})
    assert read_certificate(tmp_path / "c.json")["manifest_sha256"] == bundle.sha256
    assert bundle.sha256 != Bundle.open(folder).sha256


def test_a_certificate_that_was_changed_is_refused(forged, run, refused):
    folder = forged("grid")
    done = run("-m", "vqdeploy", "verify", folder, "--device", "cpu", "--samples", 100)
    assert done.returncode == 0, done.stderr
    said = run("-m", "vqdeploy", "inspect", folder).stdout
    assert "certificate verified on" in said
    assert "of this manifest" in said
    certificate = folder / "certificate.json"
    certificate.write_text(certificate.read_text().replace('"verified"', '"verified!"'))
    line = refused(3, "-m", "vqdeploy", "inspect", folder)
    assert "certificate.json: damaged: its seal is not the digest of its bytes" in line


def test_inspect_prints_nothing_that_a_terminal_obeys(forged, run):
    folder = forged("grid")
    sign(folder, lambda manifest: manifest["provenance"].update(recipe="\x1b[2J\x07\u202e"))
    done = run("-m", "vqdeploy", "inspect", folder)
    assert done.returncode == 0, done.stderr
    assert r"recipe \x1b[2J\x07\u202e" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())


def test_export_says_which_manifest_it_wrote_and_whether_the_model_had_a_digest(
    model_file, tmp_path, run
):
    import torch

    data = torch.load(model_file, weights_only=True)
    del data["sha256"]
    torch.save(data, tmp_path / "elsewhere.pt")
    for path, digested in ((model_file, True), (tmp_path / "elsewhere.pt", False)):
        done = run("-m", "vqdeploy", "export", path, "--output", tmp_path / "b", "--replace")
        assert done.returncode == 0, done.stderr
        digest = hashlib.sha256((tmp_path / "b" / "manifest.json").read_bytes()).hexdigest()
        assert f"manifest sha256 {digest}" in done.stdout
        assert ("no digest: it was written elsewhere" in done.stdout) != digested
