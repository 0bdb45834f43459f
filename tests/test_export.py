"""Bundles: deterministic, checked before they exist, whole or absent, refused if damaged."""

import dataclasses
import functools
import json
import shutil
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support import add, sign, weight_changed

import vqdeploy.export
import vqref
import vqtrain
from vqdeploy import Codec
from vqdeploy.agreement import check_graphs
from vqdeploy.bundle import FILES, Bundle, describe_files
from vqdeploy.export import export
from vqdeploy.graphs.build import build_graphs
from vqdeploy.proof.golden import GOLDEN_IMAGES, golden_count, golden_images
from vqdeploy.proof.measure import measured_images
from vqdeploy.proof.samples import aimed_images
from vqdeploy.runtime.sessions import Session, open_sessions
from vqdeploy.stages import STAGES
from vqdeploy.verify import verify
from vqref import families
from vqref.agreement.budget import images_within
from vqref.agreement.parity import check
from vqref.errors import InputError, ParityError
from vqref.host.images import as_batch
from vqref.preprocessing import Preprocessing
from vqref.spec import ModelSpec
from vqtrain import VQVAE


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(params=["", "residual_"], ids=["post", "residual"])
def family(request):
    """The model of a family, its bundle, and 100 images for it."""
    model, path = (request.getfixturevalue(request.param + name) for name in ("model", "bundle"))
    images = request.getfixturevalue("colour_images" if request.param else "many_images")[:100]
    return model, path, as_batch(images, model.spec.image_shape)


def test_a_bundle_holds_the_files_that_its_manifest_describes(family):
    model, path, _ = family
    content = files(path)
    manifest = json.loads(content.pop("manifest.json"))
    assert set(content) == set(FILES)
    assert manifest["files"] == describe_files(content)
    assert ModelSpec.from_dict(manifest["spec"]) == model.spec
    assert manifest["agreement"]["passed"] is True
    shape, s = list(model.spec.image_shape), model.spec.latent_size
    assert manifest["graphs"]["tokenizer"] == {
        "file": "tokenizer.onnx",
        "inputs": [{"name": "images", "dtype": "float32", "shape": ["N", *shape]}],
        "outputs": [{"name": "indices", "dtype": "int64", "shape": ["N", s]}],
    }
    found = {port["name"]: port["shape"] for port in manifest["graphs"]["decoder"]["outputs"]}
    assert found == {
        "outputs": ["N", *model.spec.output_shape],
        "reconstructions": ["N", *shape],
    }


@pytest.mark.parametrize("source", ["model_file", "residual_file"])
def test_two_exports_in_two_processes_give_the_same_bytes(run, request, tmp_path, source):
    model_file = request.getfixturevalue(source)
    for name in ("a", "b"):
        done = run("-m", "vqdeploy", "export", model_file, "--output", name)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "a") == files(tmp_path / "b")


TEN_LINES = """
model = vqtrain.train(images, epochs=1)
export(model, "mine-onnx")
print(verify("mine-onnx").report)
tokens = Codec.load("mine-onnx").encode(images)
"""


def test_a_few_lines_make_an_array_a_verified_bundle(many_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"vqtrain": vqtrain, "export": export, "verify": verify, "Codec": Codec}
    images = many_images[:200, 6:22, 6:22]
    found: dict[str, Any] = {}
    exec(TEN_LINES, known | {"images": images}, found)
    assert len(TEN_LINES.splitlines()) <= 10
    head, *rows = capsys.readouterr().out.splitlines()
    assert (head.split()[-1], {row.split()[-1] for row in rows}) == ("wrong", {"0"})
    assert (found["tokens"].shape, found["tokens"].dtype) == ((200, 1), np.int64)
    assert not Bundle.open("mine-onnx").preprocessing.size


def test_a_model_in_memory_makes_the_graphs_of_its_file(model, model_file, bundle, tmp_path, run):
    export(model, str(tmp_path / "b"))
    found, expected = Bundle.open(tmp_path / "b"), Bundle.open(bundle)
    for stage in STAGES:
        assert found.graph(stage) == expected.graph(stage)
    provenance = found.manifest["provenance"]
    assert provenance["model_digest"] == "in memory"
    assert provenance["model_sha256"] == torch.load(model_file)["sha256"]
    assert verify(found).report.passed
    card, origin = (tmp_path / "b" / "README.md").read_text(), provenance["model_sha256"]
    assert f"Content: sha256 `{origin}`" in card
    said = run("-m", "vqdeploy", "inspect", tmp_path / "b").stdout
    assert f"none, exported from memory; sha256 {origin[:16]}… of its content" in said


def test_a_model_in_memory_that_no_file_could_hold_is_refused(model, tmp_path):
    deep = {name: array.astype(np.float64) for name, array in model.params.items()}
    for other, message in (
        (dataclasses.replace(model, training={"rate": np.float32(1)}), "more than plain data"),
        (dataclasses.replace(model, params=deep), "float64, expected float32"),
    ):
        with pytest.raises(InputError, match=message):
            export(other, tmp_path / "b")
    assert not [*tmp_path.iterdir()]


def test_what_is_done_to_pictures_goes_into_the_manifest(model, tmp_path):
    done = Preprocessing(1, (28, 28), crop=True, background=(1, 2, 3))
    export(dataclasses.replace(model, preprocessing=done), tmp_path / "b")
    assert Bundle.open(tmp_path / "b").preprocessing == done
    sign(tmp_path / "b", lambda manifest: manifest["preprocessing"].update(channels=3))
    with pytest.raises(InputError, match=r"damaged: preprocessing .* does not give images"):
        Bundle.open(tmp_path / "b")


def test_graphs_agree_with_the_oracle_on_1000_images(model, many_images):
    sessions, _ = open_sessions(build_graphs(model.spec, model.params), model.spec, "cpu")
    images = many_images[:, None] / np.float32(255)
    report = check_graphs(model.spec, model.params, images, sessions).require()
    counted = {c.stage: c for c in report.checks}
    assert counted["tokenizer"].compared == 4000
    assert counted["tokenizer"].certified > 3900


SMALL: dict[str, Any] = {"num_codes": 5, "code_size": 3}
SPECS = {
    "post": families.post(base_depth=2, latent_size=2, **SMALL),
    "post in colour": families.post((3, 16, 24), base_depth=2, latent_size=2, **SMALL),
    "residual": families.residual((3, 8, 16), 4, 1, 2, **SMALL, variance=0.1),
    "residual, deep and logistic": families.residual(
        (1, 16, 8), 4, 2, 2, 8, 2, **SMALL, likelihood="logistic"
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_onnx_reference_evaluator_and_onnxruntime_and_the_oracle_agree(name):
    """onnx itself reads the files, so that a mistake shared with onnxruntime would show."""
    spec, rng = SPECS[name], np.random.default_rng(0)
    shape = spec.image_shape
    params, images = vqref.init_params(spec, rng), rng.random((3, *shape)).astype(np.float32)
    graphs = build_graphs(spec, params)
    evaluators = {
        name: ReferenceEvaluator(onnx.load_from_string(content)) for name, content in graphs.items()
    }
    inputs = {name: evaluator.input_names[0] for name, evaluator in evaluators.items()}

    def asked(name, x):
        return [*evaluators[name].run(None, {inputs[name]: x})]

    witness = {name: functools.partial(asked, name) for name in graphs}
    sessions, _ = open_sessions(graphs, spec, "cpu")
    check_graphs(spec, params, images, witness).require()
    check_graphs(spec, params, images, sessions).require()


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_pytorchs_own_exporter_makes_a_graph_of_the_module_that_computes_the_same(
    family, tmp_path, stage
):
    model, _, images = family
    images = images[:16]
    module = getattr(VQVAE(model.spec, model.params), stage).eval()
    exact = vqref.encode(model.spec, model.params, images)
    latents = exact.astype(np.float32)
    x, expected = {
        "encoder": (images, exact),
        "decoder": (latents, vqref.decode(model.spec, model.params, latents)),
    }[stage]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, and those of packages that it uses
        torch.onnx.export(
            module,
            (torch.from_numpy(x),),
            tmp_path / "traced.onnx",
            opset_version=18,
            verbose=False,
        )
    traced = ort.InferenceSession(tmp_path / "traced.onnx")
    (theirs,) = traced.run(None, {traced.get_inputs()[0].name: x})
    ours = Session(stage, build_graphs(model.spec, model.params)[stage], model.spec, "cpu")(x)[0]
    for found in (theirs, ours):
        check(stage, found, expected, precision="float32").require()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_every_graph_takes_batches_of_any_size(family, n):
    model, path, images = family
    found = Bundle.open(path)
    sessions, _ = open_sessions({stage: found.graph(stage) for stage in STAGES}, model.spec, "cpu")
    check_graphs(model.spec, model.params, images[:n], sessions).require()


def test_graphs_keep_to_what_every_provider_runs(family):
    """Opset and IR are as documented, weights are inside under the spec's names, pads are equal."""
    model, used = family[0], set()
    for name, content in build_graphs(model.spec, model.params).items():
        graph = onnx.load_from_string(content)
        assert graph.ir_version == 10
        assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
        assert all(
            tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.graph.initializer
        )
        known = {p.name for p in model.spec.parameters}
        used |= {t.name for t in graph.graph.initializer} & known
        large = {t.name for t in graph.graph.initializer if np.prod(t.dims) > 8}
        assert large <= known, name
        for node in graph.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert "auto_pad" not in attributes
            if node.op_type in ("Conv", "ConvTranspose"):
                top, left, bottom, right = attributes["pads"]
                assert (top, left) == (bottom, right), node.name
    assert {p.name for p in model.spec.parameters} - used == {
        "quantizer.ema_count",
        "quantizer.ema_means",
    }


GOLDEN_STAGES = ("latents", "indices", "gap", "rows", "outputs", "means")
GRAPH_STAGES = (
    *("encoder", "quantizer", "quantized", "tokenizer", "decoder"),
    *("reconstructions", "detokenizer", "codes"),
)


def test_a_bundle_verifies_itself_and_says_where_its_nodes_run(family):
    model, path, images = family
    report, device, placement, _ = verify(Bundle.open(path), "cpu", images)
    assert device == "cpu"
    assert report.passed
    assert [c.stage for c in report.checks] == [
        *(f"golden {name}" for name in GOLDEN_STAGES),
        *GRAPH_STAGES,
        *(["table"] if Bundle.open(path).folded else []),
        *("proved", "composed", "graphs", "weights"),
    ]
    own = len(Bundle.open(path).oracle().golden["images"]) + len(
        aimed_images(model.spec, model.params)
    )
    assert report.images == 100 + own
    assert 1 < report.codes <= model.spec.num_codes
    assert set(placement) == set(STAGES)
    assert all(set(providers) == {"CPUExecutionProvider"} for providers in placement.values())
    assert placement["quantizer"]["CPUExecutionProvider"]["ArgMin"] == 1


def test_the_golden_batch_shrinks_with_the_networks_cost():
    small = families.residual((3, 16, 16), 4, 1, 2, **SMALL)
    large = families.residual((3, 64, 64), 4, 1, 2, 2, num_codes=16_384, code_size=64)
    params = vqref.init_params(large, np.random.default_rng(0))
    assert (images_within(small, GOLDEN_IMAGES), images_within(large, GOLDEN_IMAGES)) == (32, 4)
    assert len(golden_images(large, params)) == 4
    assert measured_images(small) == 256
    assert 4 <= measured_images(large) < 256


def test_the_smallest_golden_batch_is_a_drawn_image_and_noise(monkeypatch):
    assert golden_count(families.vqgan()) == 2
    spec = families.residual((3, 16, 16), 4, 1, 2, **SMALL)
    params = vqref.init_params(spec, np.random.default_rng(0))
    usual = golden_images(spec, params)
    monkeypatch.setattr("vqdeploy.proof.golden.GOLDEN_IMAGES", 2)
    drawn, noise = golden_images(spec, params)
    assert (drawn == usual[0]).all()
    assert noise.shape == spec.image_shape
    assert (noise == np.random.default_rng(0).random(noise.shape).astype(np.float32)).all()


def test_the_oracle_answers_each_question_once(family, monkeypatch):
    """A verification asks for one pass over the images; besides, it only decodes the probes."""
    encoded, encode = [], vqref.network.encode_unscaled

    def counting(*given):
        encoded.append(len(given[2]))
        return encode(*given)

    monkeypatch.setattr("vqref.model.encode_unscaled", counting)
    monkeypatch.setattr(
        "vqref.agreement.stages.encode_unscaled", lambda *given: pytest.fail("asked twice")
    )
    _, path, images = family
    assert verify(Bundle.open(path), "cpu", images).report.passed
    assert len(encoded) == 1


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: damaged: its sha256 is not the manifest's"):
        verify(Bundle.open(copy), "cpu")


def test_a_cut_a_grown_and_a_missing_file_are_refused(copy):
    path = copy / "decoder.onnx"
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"decoder\.onnx: damaged: its size is not the \d+ bytes"
        ):
            verify(Bundle.open(copy), "cpu")
    path.unlink()
    with pytest.raises(InputError, match=r"decoder\.onnx: No such file"):
        verify(Bundle.open(copy), "cpu")


FORGERIES = {
    "a weight of the encoder": (
        "encoder",
        "encoder.conv3.weight",
        add((0, 0, 2, 2), 0.01),
        "encoder",
    ),
    "a bias of the decoder": ("decoder", "decoder.conv1.bias", add(0, 0.01), "decoder"),
    "a code of the quantizer": ("quantizer", "quantizer.codebook", add((11, 3), 1e-4), "quantized"),
    "a weight of the tokenizer": (
        "tokenizer",
        "encoder.dense.weight",
        add((0, 0), 3.0),
        "tokenizer",
    ),
    "a code of the detokenizer": (
        "detokenizer",
        "quantizer.codebook",
        add((11, 3), 0.5),
        "detokenizer",
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_graph_that_was_changed_and_signed_again_is_caught_by_its_stage(copy, kind):
    graph, initializer, change, stage = FORGERIES[kind]
    weight_changed(copy, graph, initializer, change)
    sign(copy)
    report = verify(Bundle.open(copy), "cpu").report
    assert stage in [c.stage for c in report.failures]


GOLDEN_DAMAGE = {
    "latents": lambda array: array + 1e-6,
    "indices": lambda array: (array + 1) % 16,
    "gap": lambda array: array * 1.001,
    "quantized": lambda array: array + 1e-9,
    "outputs": lambda array: array + 1e-6,
    "reconstructions": lambda array: array + 1e-9,
}


@pytest.mark.parametrize("name", GOLDEN_DAMAGE)
def test_a_recorded_answer_that_was_changed_and_signed_again_is_caught(copy, name):
    with np.load(copy / "oracle.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays[f"golden/{name}"] = GOLDEN_DAMAGE[name](arrays[f"golden/{name}"])
    np.savez(copy / "oracle.npz", **arrays)
    sign(copy)
    failed = [c.stage for c in verify(Bundle.open(copy), "cpu")[0].failures]
    shown = {"quantized": "rows", "reconstructions": "means"}.get(name, name)
    assert f"golden {shown}" in failed


def test_an_oracle_file_that_is_none_is_refused(copy):
    with np.load(copy / "oracle.npz") as archive:
        arrays = {key: archive[key] for key in archive.files if key != "golden/images"}
    np.savez(copy / "oracle.npz", **arrays)
    sign(copy)
    with pytest.raises(InputError, match="the oracle file does not fit"):
        verify(Bundle.open(copy), "cpu")
    with (copy / "oracle.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    sign(copy)
    with pytest.raises(InputError, match=r"oracle\.npz: not an oracle file"):
        verify(Bundle.open(copy), "cpu")


def manifest_changed(change):
    """Changes the manifest and seals it again, so that the check names what is wrong."""
    return lambda folder: sign(folder, change)


BAD_MANIFESTS = {
    "newer": (
        manifest_changed(lambda m: m.update(format_version=3)),
        "format version 3 is newer than 2",
    ),
    "older": (
        manifest_changed(lambda m: m.update(format_version=1)),
        r"format version 1 is no longer read; export its model\.pt again, with --replace",
    ),
    "no version": (manifest_changed(lambda m: m.pop("format_version")), "format version is None"),
    "another format": (
        manifest_changed(lambda m: m.update(format="x")),
        "not the manifest of a bundle",
    ),
    "no spec": (manifest_changed(lambda m: m.pop("spec")), "damaged: lacks 'spec'"),
    "odd spec": (
        manifest_changed(lambda m: m["spec"].update(num_codes=0)),
        "damaged: num_codes is 0",
    ),
    "no file": (
        manifest_changed(lambda m: m["files"].pop("encoder.onnx")),
        r"damaged: lacks 'encoder\.onnx'",
    ),
    "odd digest": (
        manifest_changed(lambda m: m["files"]["README.md"].update(sha256="zz")),
        "damaged: non-hexadecimal",
    ),
    "a path": (
        manifest_changed(lambda m: m["files"].update({"../x": {}})),
        r"names files that no bundle has: \.\./x",
    ),
    "negative size": (
        manifest_changed(lambda m: m["files"]["README.md"].update(bytes=-1)),
        "size or sha256 of README.md",
    ),
    "deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not JSON"),
    "not JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "not JSON"),
    "gone": (
        lambda folder: (folder / "manifest.json").unlink(),
        "not a bundle: .*manifest.json: No such file",
    ),
}


@pytest.mark.parametrize("kind", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_trusted_is_refused(copy, kind):
    damage, message = BAD_MANIFESTS[kind]
    damage(copy)
    with pytest.raises(InputError, match=message):
        Bundle.open(copy)


def test_a_graph_that_disagrees_is_not_written(model_file, tmp_path, monkeypatch):
    def wrong(spec, params, options):
        return build_graphs(
            spec, {**params, "decoder.conv1.bias": params["decoder.conv1.bias"] + 0.01}, options
        )

    monkeypatch.setattr(vqdeploy.export, "build_graphs", wrong)
    with pytest.raises(
        ParityError, match=r"model\.pt: not exported: the graphs disagree with the oracle: decoder"
    ) as caught:
        export(model_file, tmp_path / "out")
    assert [c.stage for c in caught.value.report.failures] == [
        "decoder",
        "reconstructions",
        "detokenizer",
        "weights",
    ]
    assert not [*tmp_path.iterdir()]


def test_a_bundle_of_an_older_version_may_be_replaced(copy, model_file):
    manifest_changed(lambda m: m.update(format_version=1))(copy)
    export(model_file, copy, replace=True)
    assert verify(Bundle.open(copy), "cpu").report.passed


def test_an_existing_bundle_is_replaced_only_when_asked(copy, model_file):
    (copy / "README.md").write_text("mine")
    with pytest.raises(InputError, match="copy: exists already; use --replace"):
        export(model_file, copy)
    assert (copy / "README.md").read_text() == "mine"
    export(model_file, copy, replace=True)
    assert verify(Bundle.open(copy), "cpu")[0].passed
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path, model_file):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis: not replaced: it is not a bundle"):
        export(model_file, tmp_path / "thesis", replace=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "years of work"
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(InputError, match=r"link: is not a folder"):
        export(model_file, tmp_path / "link", replace=True)


def test_a_publication_that_fails_halfway_leaves_the_old_bundle(copy, model_file, monkeypatch):
    before = files(copy)
    monkeypatch.setattr(
        vqref.host.files,
        "_write",
        lambda path, content: (_ for _ in ()).throw(OSError(28, "No space left")),
    )
    with pytest.raises(OSError, match="No space left"):
        export(model_file, copy, replace=True)
    assert files(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
