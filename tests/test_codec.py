"""The Codec: what other programs call, and what it accepts."""

import dataclasses
import hashlib
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import distribution, packages_distributions
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support import ROOT

import vqref
from vqdeploy import Codec
from vqdeploy.runtime.sessions import open_sessions
from vqref.errors import InputError, MachineError
from vqref.host.images import as_batch
from vqref.preprocessing import Preprocessing
from vqref.spec import CODEBOOK


@pytest.fixture(scope="module")
def codec(bundle) -> Codec:
    return Codec.load(bundle, device="cpu")


@pytest.mark.parametrize(
    ("kind", "pictures"), [("", "many_images"), ("residual_", "colour_images")], ids=str
)
def test_encode_gives_the_oracles_indices_and_decode_its_reconstructions(request, kind, pictures):
    model = request.getfixturevalue(f"{kind}model")
    codec = Codec.load(request.getfixturevalue(f"{kind}bundle"), "cpu")
    spec, images = model.spec, request.getfixturevalue(pictures)[:100]
    out = vqref.forward(spec, model.params, as_batch(images, spec.image_shape))
    indices = codec.encode(images)
    assert (indices.shape, indices.dtype) == ((100, spec.latent_size), np.int64)
    clear = out.gap > 1e-3
    np.testing.assert_array_equal(indices[clear], out.indices[clear])
    assert (indices == out.indices).mean() > 0.99
    reconstructions = codec.decode(out.indices)
    assert (reconstructions.shape, reconstructions.dtype) == ((100, *spec.image_shape), np.float32)
    np.testing.assert_allclose(reconstructions, out.reconstructions, atol=1e-5)
    np.testing.assert_array_equal(codec.reconstruct(images), codec.decode(indices))


def test_every_form_of_the_same_images_gives_the_same_tokens(codec, many_images):
    grey = many_images[:20]
    expected = codec.encode(grey)
    for images in (grey[:, None], grey[..., None], grey / np.float32(255), [*grey]):
        np.testing.assert_array_equal(codec.encode(images), expected)


def test_large_batches_are_cut_and_empty_ones_answered(codec, many_images, monkeypatch):
    whole = codec.encode(many_images[:50])
    for session in codec._sessions.values():
        monkeypatch.setattr(session, "_largest", 7)
    np.testing.assert_array_equal(codec.encode(many_images[:50]), whole)
    np.testing.assert_array_equal(codec.decode(whole), codec.decode(whole[::-1])[::-1])
    assert codec.encode(many_images[:0]).shape == (0, 4)
    assert codec.decode(np.zeros((0, 4), int)).shape == (0, 1, 28, 28)


def test_samples_are_drawn_by_the_seed_or_the_generator_that_was_passed(codec):
    first, again = (codec.sample(3, seed=np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for seed in (5, np.int64(5), np.array(5)):
        np.testing.assert_array_equal(codec.sample(3, seed=seed), first)
    assert not np.array_equal(codec.sample(3, seed=0), codec.sample(3, seed=1))
    rng = np.random.default_rng(5)
    assert not np.array_equal(codec.sample(3, seed=rng), codec.sample(3, seed=rng))
    assert not np.array_equal(codec.sample(8), codec.sample(8))
    assert (first.shape, first.dtype) == ((3, 1, 28, 28), np.float32)
    assert codec.sample(0).shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    "seed", [True, np.False_, -1, 0.0, "5", b"5", [5], np.random.RandomState(5), np.zeros(2, int)]
)
def test_what_is_no_seed_is_refused_and_never_ignored(codec, seed):
    with pytest.raises((TypeError, ValueError), match=r"^seed is .*, expected an integer"):
        codec.sample(2, seed=seed)


@pytest.mark.parametrize("n", [True, -1, 1.0, "2", None])
def test_what_is_no_number_of_samples_is_refused(codec, n):
    with pytest.raises((TypeError, ValueError), match=r"^n is .*, expected an integer from 0 on$"):
        codec.sample(n, seed=0)


def test_it_says_what_it_is_and_what_runs(codec, bundle, model):
    assert codec.spec == model.spec
    assert codec.preprocessing == Preprocessing(1)
    assert codec.device == "cpu"
    assert codec.providers == ("CPUExecutionProvider",)
    digest = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    assert codec.manifest_sha256 == digest
    expected = "<Codec post: images (1, 28, 28), 4 tokens of 16, on cpu, bundle "
    assert repr(codec) == f"{expected}{digest[:12]}>"
    with Codec.load(bundle, "cpu") as closed:
        pass
    assert repr(closed).endswith(", closed>")


@pytest.mark.parametrize(
    ("kind", "pictures"), [("", "many_images"), ("residual_", "colour_images")], ids=str
)
def test_latents_are_the_oracles_and_the_nearest_codes_are_the_tokens(request, kind, pictures):
    model = request.getfixturevalue(f"{kind}model")
    codec = Codec.load(request.getfixturevalue(f"{kind}bundle"), "cpu")
    spec, images = model.spec, request.getfixturevalue(pictures)[:20]
    latents, codebook = codec.latents(images), codec.codebook
    shape = (20, spec.latent_size, spec.code_size)
    assert (latents.shape, latents.dtype) == (shape, np.float32)
    batch = as_batch(images, spec.image_shape)
    np.testing.assert_allclose(latents, vqref.encode(spec, model.params, batch), atol=1e-5)
    assert (codebook.shape, codebook.dtype) == ((spec.num_codes, spec.code_size), np.float32)
    np.testing.assert_array_equal(codebook, model.params[CODEBOOK])
    distances = ((latents[:, :, None] - codebook) ** 2).sum(-1)
    np.testing.assert_array_equal(distances.argmin(-1), codec.encode(images))
    with pytest.raises(ValueError, match="read-only"):
        codebook[0, 0] = 1


def test_the_graph_of_the_latents_is_opened_once_by_whoever_is_first(
    bundle, many_images, monkeypatch
):
    codec, opened = Codec.load(bundle, "cpu"), []

    def counted(graphs, *arguments, **options):
        opened.extend(graphs)
        return open_sessions(graphs, *arguments, **options)

    monkeypatch.setattr("vqdeploy.codec.open_sessions", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(codec.latents, [many_images[:3]] * 16))
    assert opened == ["encoder"]
    for latents in found:
        np.testing.assert_array_equal(latents, found[0])


def test_latents_of_a_bundle_that_changed_since_it_was_loaded_are_refused(
    bundle, many_images, tmp_path, monkeypatch
):
    shutil.copytree(bundle, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    codec = Codec.load("copy", "cpu")
    content = bytearray((tmp_path / "copy" / "encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "copy" / "encoder.onnx").write_bytes(content)
    monkeypatch.chdir("/")  # it remembers where the bundle is
    with pytest.raises(InputError, match=r"encoder\.onnx: damaged: its sha256"):
        codec.latents(many_images[:1])
    (tmp_path / "copy" / "oracle.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"oracle\.npz: damaged"):
        _ = codec.codebook
    assert codec.encode(many_images[:1]).shape == (1, 4)


def test_levels_are_the_nearest_of_256(codec, many_images):
    indices = codec.encode(many_images[:50])
    exact = codec.decode(indices)
    for levels in (
        codec.decode(indices, uint8=True),
        codec.reconstruct(many_images[:50], uint8=True),
    ):
        assert (levels.shape, levels.dtype) == (exact.shape, np.uint8)
        assert np.abs(levels - 255 * exact.astype(np.float64)).max() <= 0.5 + 1e-4
    assert codec.decode(indices[:0], uint8=True).shape == (0, 1, 28, 28)


@pytest.mark.parametrize(("x", "level"), [(0, 0), (1, 255), (0.5 / 255, 0), (1.5 / 255, 2)])
def test_half_way_is_rounded_to_the_even_level(codec, monkeypatch, x, level):
    monkeypatch.setattr(codec, "_run", lambda stage, array: np.full((1, 1, 28, 28), x, np.float32))
    assert (codec.decode([[0] * 4], uint8=True) == level).all()


@pytest.fixture
def paths(tmp_path, many_images):
    for i, image in enumerate(many_images[:3]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return [tmp_path / f"{i}.png" for i in range(3)]


def test_pictures_are_encoded_as_their_pixels_are(codec, many_images, paths):
    expected = codec.encode(many_images[:3])
    opened = [Image.open(path) for path in paths]
    for pictures in (
        paths,
        [*map(str, paths)],
        tuple(opened),
        [paths[0], opened[1], str(paths[2])],
    ):
        prepared = codec.prepare(pictures)
        assert (prepared.shape, prepared.dtype) == ((3, 1, 28, 28), np.uint8)
        np.testing.assert_array_equal(prepared[:, 0], many_images[:3])
        np.testing.assert_array_equal(codec.encode(pictures), expected)
        np.testing.assert_array_equal(codec.latents(pictures), codec.latents(many_images[:3]))
        np.testing.assert_array_equal(codec.reconstruct(pictures), codec.decode(expected))
    for one in (paths[0], str(paths[0]), opened[0]):
        np.testing.assert_array_equal(codec.encode(one), expected[:1])


def test_a_picture_is_prepared_as_in_training_and_not_taken_for_an_array(tmp_path, many_images):
    from support import small_model

    from vqdeploy.export import export
    from vqref import families
    from vqref.host.pictures import prepare

    model = small_model(
        families.post((3, 16, 24), base_depth=4, latent_size=2, num_codes=8, code_size=4)
    )
    done = Preprocessing(3, (16, 24), crop=True, background=(255, 0, 0))
    export(dataclasses.replace(model, preprocessing=done), tmp_path / "b")
    codec = pickle.loads(pickle.dumps(Codec.load(tmp_path / "b", "cpu")))
    assert codec.preprocessing == done
    pixels = np.stack([*many_images[:4]], -1)  # RGBA, and of another size than the model's
    picture = Image.fromarray(pixels)
    prepared = prepare(picture, (3, 16, 24), done)
    np.testing.assert_array_equal(codec.prepare([picture] * 2), np.concatenate([prepared] * 2))
    np.testing.assert_array_equal(codec.encode(picture), codec.encode(prepared))
    exact = Image.fromarray(np.ascontiguousarray(prepared[0].transpose(1, 2, 0)))
    np.testing.assert_array_equal(codec.encode(exact), codec.encode(prepared))
    with pytest.raises(InputError, match="shape is"):
        codec.encode(pixels)  # an array must have the model's size and channels


def test_pictures_that_it_cannot_encode_are_named(codec, many_images, tmp_path):
    Image.fromarray(many_images[0][:20]).save(tmp_path / "low.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name, said in (("low", "20x28 pixels"), ("bad", "not a readable"), ("none", "No such")):
        with pytest.raises(InputError, match=rf"{name}\.png: .*{said}"):
            codec.encode([tmp_path / f"{name}.png"])
    with pytest.raises(InputError, match="picture 1 is a ndarray"):
        codec.encode([Image.fromarray(many_images[0]), many_images[1]])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((2, 28, 27)),
            r"images: shape is \(2, 28, 27\), expected \(N, 28, 28\), \(N, 1, 28, 28\)",
        ),
        (np.full((1, 28, 28), np.nan), "images: nan at"),
        (np.full((1, 28, 28), 255.0), r"values from 255 to 255, expected \[0, 1\] \(or uint8\)"),
        (np.zeros((1, 28, 28), int), "images: dtype is int64"),
    ],
)
def test_images_that_it_cannot_encode_are_named_and_never_become_index_0(codec, images, message):
    with pytest.raises(InputError, match=message):
        codec.encode(images)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.array([[0, 0, 0, 16]]), "indices: values from 0 to 16, expected 0 to 15"),
        (np.array([[0, 0, 0, -1]]), "indices: values from -1 to 0"),
        (np.array([[0, 0, 0]]), r"indices: shape is \(1, 3\), expected \(N, 4\)"),
        (np.zeros((1, 4)), "indices: dtype is float64"),
    ],
)
def test_indices_that_it_cannot_decode_are_named_and_never_wrap(codec, indices, message):
    with pytest.raises(ValueError, match=message):
        codec.decode(indices)


def test_colour_images_of_another_size_in_both_layouts(tmp_path):
    from support import small_model

    from vqdeploy.export import export
    from vqref import families
    from vqtrain.modelfile import write_model

    model = small_model(
        families.post((3, 16, 24), base_depth=4, latent_size=2, num_codes=8, code_size=4)
    )
    write_model(tmp_path / "m.pt", model)
    export(tmp_path / "m.pt", tmp_path / "b")
    codec = Codec.load(tmp_path / "b", device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    indices = codec.encode(images)
    np.testing.assert_array_equal(indices, codec.encode(images.transpose(0, 3, 1, 2)))
    out = vqref.forward(model.spec, model.params, images.transpose(0, 3, 1, 2) / np.float32(255))
    np.testing.assert_array_equal(indices, out.indices)
    np.testing.assert_allclose(codec.decode(indices), out.reconstructions, atol=1e-5)


def test_indices_are_int64_whatever_they_are_in_the_graphs(model, codec, many_images, tmp_path):
    from vqdeploy.export import export
    from vqdeploy.graphs.build import GraphOptions

    options = GraphOptions(index_type="int32", batch=4)
    export(model, tmp_path / "b", options=options)
    other = Codec.load(tmp_path / "b", "cpu")
    indices = other.encode(many_images[:10])
    assert indices.dtype == np.int64
    np.testing.assert_array_equal(indices, codec.encode(many_images[:10]))
    np.testing.assert_allclose(other.decode(indices), codec.decode(indices), atol=1e-6)
    np.testing.assert_allclose(
        other.latents(many_images[:10]), codec.latents(many_images[:10]), atol=1e-6
    )


def test_threads_share_one_codec(codec, many_images):
    parts = [many_images[i : i + 10] for i in range(0, 200, 10)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(codec.encode, parts))
    for part, indices in zip(parts, found, strict=True):
        np.testing.assert_array_equal(indices, codec.encode(part))


def test_a_bare_image_is_a_batch_of_one(codec, many_images):
    np.testing.assert_array_equal(codec.encode(many_images[0]), codec.encode(many_images[:1]))


def test_it_is_pickled_for_a_worker_process(codec, many_images):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        (found,) = pool.map(codec.encode, [many_images[:20]])
    np.testing.assert_array_equal(found, codec.encode(many_images[:20]))
    again = pickle.loads(pickle.dumps(codec))
    np.testing.assert_array_equal(again.latents(many_images[:2]), codec.latents(many_images[:2]))
    np.testing.assert_array_equal(again.codebook, codec.codebook)
    assert again.manifest_sha256 == codec.manifest_sha256
    assert (again.spec, again.device, again.providers) == (
        codec.spec,
        codec.device,
        codec.providers,
    )


def test_a_closed_codec_says_so(bundle, many_images):
    with Codec.load(bundle, "cpu") as codec:
        codec.encode(many_images[:1])
    for call in (codec.encode, codec.latents, codec.reconstruct):
        with pytest.raises(ValueError, match="the Codec was closed"):
            call(many_images[:1])


def test_options_reach_onnxruntime(bundle, many_images):
    options = onnxruntime.SessionOptions()
    codec = Codec.load(
        bundle, providers=["CPUExecutionProvider"], session_options=options, intra_op_num_threads=1
    )
    assert (codec.device, options.intra_op_num_threads) == ("custom", 1)
    assert codec.encode(many_images[:3]).shape == (3, 4)
    assert codec.latents(many_images[:3]).shape == (3, 4, 8)
    with pytest.raises(TypeError, match="session_options cannot be pickled"):
        pickle.dumps(codec)
    with pytest.raises(ValueError, match="device is 'cpu' and providers are given"):
        Codec.load(bundle, "cpu", providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_first_provider_that_is_not_there_is_an_error(bundle):
    with pytest.raises(MachineError, match="DmlExecutionProvider"):
        Codec.load(bundle, providers=["DmlExecutionProvider", "CPUExecutionProvider"])


def test_bound_outputs_are_those_of_a_plain_run_and_batches_come_in_few_sizes(
    bundle, many_images, monkeypatch
):
    """Does on the CPU what a card gets: inputs padded to a power of two, and bound outputs."""
    codec, bound = Codec.load(bundle, "cpu"), Codec.load(bundle, "cpu")
    sizes: list[int] = []
    for session in bound._sessions.values():
        monkeypatch.setattr(session, "_on_card", True)
        run = session._bound

        def counted(given, run=run):
            sizes.extend(map(len, given.values()))
            return run(given)

        monkeypatch.setattr(session, "_bound", counted)
    for n in (0, 1, 3, 8, 13):
        np.testing.assert_array_equal(bound.encode(many_images[:n]), codec.encode(many_images[:n]))
    assert sizes == [0, 1, 4, 8, 16]
    np.testing.assert_allclose(
        bound.reconstruct(many_images[:5]), codec.reconstruct(many_images[:5]), atol=1e-6
    )


def test_eight_threads_of_a_thousand_calls_agree_and_memory_does_not_grow(codec, many_images):
    resource = pytest.importorskip("resource", reason="needs a POSIX system")
    parts = [many_images[i : i + 2] for i in range(0, 40, 2)]
    expected = [codec.encode(part) for part in parts]

    def work(_):
        return all(
            np.array_equal(codec.encode(parts[i % 20]), expected[i % 20]) for i in range(1000)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert all(pool.map(work, range(8)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024  # KiB


def test_a_named_device_that_is_absent_is_an_error(bundle, monkeypatch):
    monkeypatch.setattr("vqdeploy.runtime.sessions.cuda_devices", lambda: 0)
    with pytest.raises(MachineError, match="device cuda"):
        Codec.load(bundle, device="cuda")


def test_a_damaged_bundle_is_refused_when_it_is_loaded(tmp_path):
    with pytest.raises(InputError, match="not a bundle"):
        Codec.load(tmp_path)


PROGRAM = """
import sys
import numpy as np
from vqdeploy import Codec
codec = Codec.load(sys.argv[1])
images = np.load(sys.argv[2])
indices = codec.encode(images)
assert codec.decode(indices).shape == (len(images), 1, 28, 28)
for absent in ("torch", "onnx", "scipy", "tqdm"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} can be imported: this environment proves nothing")
np.save(sys.argv[3], indices)
from vqdeploy.bundle import Bundle
from vqdeploy.verify import verify
assert verify(Bundle.open(sys.argv[1]), "cpu").report.passed
"""


def test_a_program_with_numpy_and_onnxruntime_alone_runs_and_verifies_it(
    bundle, codec, many_images, tmp_path, run
):
    """The interpreter's path has only this project, numpy and onnxruntime, not torch or scipy."""
    site = tmp_path / "site"
    site.mkdir()
    for package in ("numpy", "onnxruntime"):
        (name,) = set(packages_distributions()[package])
        found = distribution(name)
        for top in {Path(file).parts[0] for file in found.files if ".." not in Path(file).parts}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    for package in ("vqref", "vqdeploy"):
        (site / package).symlink_to(ROOT / package)
    (tmp_path / "program.py").write_text(PROGRAM)
    np.save(tmp_path / "images.npy", many_images[:10])
    start = f"import sys; sys.path.append({str(site)!r}); "
    done = run(
        *("-I", "-S", "-c", start + "sys.argv.pop(0); exec(open(sys.argv[0]).read())"),
        *("program.py", bundle, "images.npy", "out.npy"),
    )
    assert done.returncode == 0, done.stderr
    verified = run(
        "-I",
        "-S",
        "-c",
        start + "from vqdeploy.__main__ import main; sys.exit(main())",
        "verify",
        bundle,
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    assert verified.stdout.splitlines()[-1] == "verified: what runs is what was trained"
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), codec.encode(many_images[:10]))


def test_loading_on_the_cpu_says_nothing(bundle, run):
    code = f"from vqdeploy import Codec; Codec.load({str(bundle)!r}, device='cpu')"
    done = run("-c", code, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
