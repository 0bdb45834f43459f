"""Measuring: each figure comes with its meaning, and with what is reached without a network."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.cluster.vq import kmeans2, vq
from support import small_model

import vqref
from vqref import families
from vqref.host.images import to_unit_interval
from vqref.preprocessing import Preprocessing
from vqtrain.__main__ import main
from vqtrain.commands.evaluate import MEANING
from vqtrain.data.holdout import split
from vqtrain.modelfile import write_model
from vqtrain.run import floor
from vqtrain.run.floor import clustering_floor, patch_floor


@pytest.fixture
def evaluate(capsys):
    """Runs the command, which must end with ``code``, and returns what it says.

    A refusal must be one line.
    """

    def said(*arguments: object, code: int = 0) -> str:
        try:
            found: object = main(["evaluate", *map(str, arguments), "--device", "cpu"])
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert found == code, err
        assert len(err.splitlines()) == (1 if code else 0)
        return err if code else out

    return said


@pytest.fixture
def data(tmp_path, many_images):
    folder = tmp_path / "kmnist"
    folder.mkdir()
    np.savez(folder / "kmnist-train-imgs.npz", many_images[:300])
    np.savez(folder / "kmnist-test-imgs.npz", many_images[300:400])
    return folder


@pytest.fixture
def colour_file(tmp_path, colour_images):
    path = tmp_path / "colour.npy"
    np.save(path, colour_images)
    return path


def test_evaluate_prints_each_measure_with_what_it_means(
    evaluate, model_file, model, data, many_images
):
    heading, *lines = evaluate(model_file, "--data", data).splitlines()
    assert heading.endswith("on 100 held-out images of kmnist-train-imgs.npz, cpu")
    assert all(len(line) <= 80 for line in lines)
    out = vqref.forward(model.spec, model.params, to_unit_interval(many_images[300:400, None]))
    shown = f"{out.losses.reconstruction:>9.2f}"
    assert f"  reconstruction     {shown}  nats per image to send the pixels" in lines
    found = json.loads(evaluate(model_file, "--data", data, "--json"))
    assert [line.split()[0] for line in lines] == [name for name in MEANING if name in found]
    assert found["bound"] == pytest.approx(out.losses.bound, rel=1e-5)
    assert found["codes_used"] == len(np.unique(out.indices))
    error = np.square(to_unit_interval(many_images[300:400, None]) - out.reconstructions).mean()
    variance = (many_images[:300] / 255).var()  # the spec does not hold it
    assert found["nmse"] == pytest.approx(error / variance, rel=1e-4)
    assert not {"clustering_floor", "patches_nmse"} & set(found)  # four latents, not a grid


def test_a_grid_stands_beside_k_means_on_patches(
    evaluate, residual_file, residual_model, colour_file, colour_images
):
    heading, *lines = evaluate(residual_file, "--data", colour_file).splitlines()
    assert heading.endswith("on 300 images of colour.npy, cpu")
    assert lines[-1] == "  patches_nmse was fitted to the measured images themselves"
    assert all(len(line) <= 80 for line in lines)
    found = json.loads(evaluate(residual_file, "--data", colour_file, "--json"))
    assert found["floor_fitted_to"] == "measured images"
    spec = residual_model.spec
    error = patch_floor(spec, colour_images, colour_images, np.random.default_rng(0))
    assert found["patches_nmse"] == pytest.approx(error / spec.variance)
    assert found["patches_psnr"] == pytest.approx(-10 * np.log10(error))
    assert found["nmse"] > found["patches_nmse"]  # untrained


@pytest.fixture
def trained_on(model, tmp_path):
    """Writes a model whose provenance says that it was trained on a file; returns its path.

    data: changes what it says.
    """

    def write(file, **data):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        about = {"source": file.name, "sha256": digest, "images": 1, **data}
        changed = dataclasses.replace(model, provenance={"data": about})
        write_model(tmp_path / "trained.pt", changed)
        return tmp_path / "trained.pt"

    return write


@pytest.fixture
def file(tmp_path, many_images):
    np.save(tmp_path / "mine.npy", many_images[:200])
    return tmp_path / "mine.npy"


@pytest.fixture
def measured_on(evaluate, tmp_path):
    """Returns what the heading and the JSON say that a model was measured on."""

    def said(model_file, *arguments):
        heading = evaluate(model_file, "--data", *arguments).splitlines()[0]
        found = json.loads(evaluate(model_file, "--data", *arguments, "--json"))
        how = f" ({found['how']})" if found["how"] else ""
        label = f"{found['images']} {found['which']} of {found['data']}{how}"
        assert heading == f"{model_file} on {label}, cpu"
        return label, found

    return said


OUT = {"fraction": 0.1, "images": 1}


def test_a_file_that_the_model_was_not_trained_on_is_measured_whole(
    measured_on, trained_on, file, tmp_path, many_images
):
    np.save(tmp_path / "emoji32-test.npy", many_images[200:300])
    path = trained_on(file, held_out=OUT)
    label, _ = measured_on(path, tmp_path / "emoji32-test.npy")
    assert label == "100 images of emoji32-test.npy"


def test_of_the_training_file_what_training_held_out_is_measured(
    measured_on, trained_on, file, model, many_images
):
    out = split(many_images[:200, None], 0.1)
    label, found = measured_on(trained_on(file, held_out=OUT), file)
    assert label == f"{out.sum()} held-out images of mine.npy (a tenth, by hash)"
    images = to_unit_interval(many_images[:200, None][out])
    expected = vqref.forward(model.spec, model.params, images).losses.bound
    assert found["bound"] == pytest.approx(expected, rel=1e-5)
    quarter = trained_on(file, held_out={"fraction": 0.25, "images": 1})
    count = split(many_images[:200, None], 0.25).sum()
    label, _ = measured_on(quarter, file)
    assert label == f"{count} held-out images of mine.npy (0.25, by hash)"


@pytest.mark.parametrize(
    "held_out",
    [
        {},
        {"held_out": {"images": 0, "fraction": 0.0}},
        {"held_out": {"images": 9}},
        {"held_out": {"images": 9, "source": "other.npy", "sha256": "1" * 64}},
    ],
    ids=["an older model", "nothing held out", "the source's own", "others"],
)
def test_what_the_model_was_trained_on_is_called_training_images(
    measured_on, trained_on, file, held_out
):
    label, _ = measured_on(trained_on(file, **held_out), file)
    assert label == "200 training images of mine.npy"


def test_the_file_that_training_held_out_is_held_out(
    measured_on, trained_on, file, tmp_path, many_images
):
    np.save(tmp_path / "test.npy", many_images[200:250])
    digest = hashlib.sha256((tmp_path / "test.npy").read_bytes()).hexdigest()
    held_out = {"source": "test.npy", "sha256": digest, "images": 50}
    label, _ = measured_on(trained_on(file, held_out=held_out), tmp_path / "test.npy")
    assert label == "50 held-out images of test.npy"


def test_what_a_source_holds_out_of_its_own_is_held_out(measured_on, trained_on, data):
    path = trained_on(data / "kmnist-train-imgs.npz", held_out={"images": 100})
    label, _ = measured_on(path, data)
    assert label == "100 held-out images of kmnist-train-imgs.npz"
    label, _ = measured_on(path, data / "kmnist-test-imgs.npz")
    assert label == "100 images of kmnist-test-imgs.npz"


def test_held_out_images_are_those_that_are_asked_for(
    measured_on, trained_on, file, tmp_path, many_images
):
    np.save(tmp_path / "test.npy", many_images[200:250])
    other = trained_on(tmp_path / "test.npy", held_out=OUT)
    count = split(many_images[:200, None], 0.25).sum()
    label, _ = measured_on(other, file, "--held-out", 0.25)
    assert label == f"{count} held-out images of mine.npy (0.25, by hash)"
    label, _ = measured_on(
        trained_on(file, held_out=OUT), file, "--held-out", tmp_path / "test.npy"
    )
    assert label == "50 held-out images of test.npy"


def test_images_that_training_has_seen_are_not_called_held_out(
    measured_on, trained_on, file, many_images
):
    path = trained_on(file, held_out=OUT)
    out, more = (split(many_images[:200, None], fraction) for fraction in (0.1, 0.25))
    label, _ = measured_on(path, file, "--held-out", 0.25)
    seen = f"{(more & ~out).sum()} of them trained on"
    assert label == f"{more.sum()} images of mine.npy (0.25, by hash; {seen})"
    label, _ = measured_on(path, file, "--held-out", 0)
    assert label == f"200 images of mine.npy ({(~out).sum()} of them trained on)"
    fewer = split(many_images[:200, None], 0.05)
    label, _ = measured_on(path, file, "--held-out", 0.05)
    assert label == f"{fewer.sum()} held-out images of mine.npy (0.05, by hash)"
    label, _ = measured_on(path, file, "--held-out", file)
    assert label == f"200 images of mine.npy ({(~out).sum()} of them trained on)"


@pytest.mark.parametrize(
    "held_out", ["a tenth", {"fraction": "a tenth"}, {"fraction": 1.5}, {"fraction": 0}, [0.1]]
)
def test_what_a_model_says_without_sense_is_no_claim(measured_on, trained_on, file, held_out):
    label, _ = measured_on(trained_on(file, held_out=held_out), file)
    assert label == "200 images of mine.npy"


def test_a_model_that_says_nothing_of_its_data_is_measured(measured_on, model, tmp_path, data):
    write_model(tmp_path / "bare.pt", dataclasses.replace(model, provenance={}))
    label, _ = measured_on(tmp_path / "bare.pt", data)
    assert label == "100 held-out images of kmnist-train-imgs.npz"


def test_floors_are_fitted_to_the_images_that_are_left(evaluate, tmp_path, many_images):
    spec = families.post((1, 28, 28), base_depth=2, num_codes=8, code_size=4)
    write_model(tmp_path / "one.pt", small_model(spec))
    np.save(tmp_path / "mine.npy", many_images[:200])
    out = split(many_images[:200, None], 0.25)
    run = (tmp_path / "one.pt", "--data", tmp_path / "mine.npy")
    found = json.loads(evaluate(*run, "--held-out", 0.25, "--json"))
    fit, apart = (to_unit_interval(many_images[:200, None][part]) for part in (~out, out))
    expected = clustering_floor(fit, apart, 8, np.random.default_rng(0))
    assert found["clustering_floor"] == pytest.approx(expected)
    assert found["floor_fitted_to"] == "other images"
    assert found["above_floor"] == found["bound"] - found["clustering_floor"]
    own = "  clustering_floor was fitted to the measured images themselves"
    assert own not in evaluate(*run, "--held-out", 0.25).splitlines()
    assert own in evaluate(*run).splitlines()
    assert own in evaluate(*run, "--binarize").splitlines()


@pytest.fixture
def pictures(tmp_path, many_images):
    """A folder of ten pictures of 40x28 pixels, one of them broken, one in a subfolder."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for i in range(9):
        wide = np.zeros((28, 40), np.uint8)
        wide[:, 6:34] = many_images[i]
        Image.fromarray(wide).save(folder / ("sub" if i == 8 else ".") / f"{i}.png")
    (folder / "9.png").write_bytes(b"no picture")
    return folder


def test_pictures_are_prepared_as_those_of_training_were(
    evaluate, model, pictures, tmp_path, many_images
):
    prepared = Preprocessing(1, (28, 28), crop=True)
    write_model(tmp_path / "pictures.pt", dataclasses.replace(model, preprocessing=prepared))
    run = (tmp_path / "pictures.pt", "--data", pictures)
    assert "9.png" in evaluate(*run, code=3)
    found = json.loads(evaluate(*run, "--skip-bad", "--recursive", "--json"))
    assert found["images"] == 9
    assert found["said"][0] == "9 of 9 pictures resized to 28x28, 9 of them cropped to the middle"
    assert found["said"][1].startswith("1 skipped, broken: 9.png: ")
    out = vqref.forward(model.spec, model.params, to_unit_interval(many_images[:9, None]))
    assert found["bound"] == pytest.approx(out.losses.bound, rel=1e-5)
    lines = evaluate(*run, "--skip-bad").splitlines()
    assert lines[0].startswith("8 of 8 pictures resized to 28x28")
    assert f"{run[0]} on 8 images of pictures, cpu" in lines
    held_out = evaluate(run[0], "--data", pictures / "0.png", "--held-out", pictures / "1.png")
    assert f"{run[0]} on 1 held-out image of 1.png, cpu" in held_out.splitlines()


def test_the_entropy_of_the_pixels_stands_beside_the_bound(evaluate, model_file, data, many_images):
    lines = evaluate(model_file, "--data", data).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  bound "))
    name, value, *meaning = lines[at + 1].split()
    x = many_images[300:400] / 255
    y = 1 - x
    logs = (np.log(v, where=v > 0, out=np.zeros_like(v)) * v for v in (x, y))
    assert (name, value) == ("pixel_entropy", f"{-sum(part.sum() for part in logs) / 100:.2f}")
    assert " ".join(meaning) == "nats per image of a perfect reconstruction"


def test_threads_are_an_option(evaluate, model_file, data, monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    evaluate(model_file, "--data", data, "--threads", 3)
    assert taken == [3, torch.get_num_threads()]
    assert "--threads" in evaluate(model_file, "--data", data, "--threads", 0, code=2)


def test_binarized_images_are_drawn_by_their_grey_levels(evaluate, model_file, data):
    plain, drawn, again = (
        json.loads(evaluate(model_file, "--data", data, "--json", *more))
        for more in ((), ("--binarize",), ("--binarize",))
    )
    assert drawn == again
    assert drawn["binarized"] is True
    assert drawn["reconstruction"] != plain["reconstruction"]


def test_the_floor_of_well_separated_clusters_is_their_entropy():
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 2, (4, 1, 8, 8)).astype(np.float32)
    train, held_out = (centres[rng.integers(0, 4, n)] for n in (200, 50))
    assert clustering_floor(train, held_out, 4, rng) == pytest.approx(np.log(4), abs=0.8)
    one = clustering_floor(train, held_out, 1, rng)
    mean = np.clip(train.mean(axis=0), 1e-6, 1 - 1e-6)
    entropy = (
        -(held_out * np.log(mean) + (1 - held_out) * np.log1p(-mean)).sum(axis=(1, 2, 3)).mean()
    )
    assert one == pytest.approx(entropy, rel=0.02)


def test_more_prototypes_lower_the_floor(many_images):
    images = to_unit_interval(many_images[:, None])
    floors = [
        clustering_floor(images[:800], images[800:], k, np.random.default_rng(0)) - np.log(k)
        for k in (1, 4, 16)
    ]
    assert floors[0] > floors[1] > floors[2]


def patches(images, size):
    """Returns patches (n, C * size * size) of images (N, C, H, W), by slices."""
    _, _, height, width = images.shape
    parts = [
        images[:, :, i : i + size, j : j + size].reshape(len(images), -1)
        for i in range(0, height, size)
        for j in range(0, width, size)
    ]
    return np.concatenate(parts)


@pytest.fixture
def grid():
    return families.residual((3, 16, 16), 8, 1, 4, num_codes=16, code_size=4)


def test_the_floor_of_a_grid_is_k_means_on_its_patches(grid, colour_images):
    train, measured = colour_images[:200], colour_images[200:]
    found = patch_floor(grid, train, measured, np.random.default_rng(0))
    x, y = (patches(to_unit_interval(part), 4).astype(np.float64) for part in (train, measured))
    errors = []
    for seed in range(5):
        codes, _ = kmeans2(x, 16, minit="++", rng=np.random.default_rng(seed), iter=60)
        errors.append(np.square(vq(y, codes)[1]).mean() / 48)
    assert min(errors) * 0.97 < found < max(errors) * 1.03  # all are local optima


def test_patches_that_are_as_many_as_the_codes_are_sent_without_error(grid):
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (16, 3, 4, 4), np.uint8)
    choice = rng.integers(0, 16, (100, 4, 4))
    images = tiles[choice].transpose(0, 3, 1, 4, 2, 5).reshape(100, 3, 16, 16)
    assert patch_floor(grid, images, images, rng) == pytest.approx(0, abs=1e-6)


def test_a_sample_says_much_the_same(grid, colour_images, monkeypatch):
    whole = patch_floor(grid, colour_images, colour_images, np.random.default_rng(0))
    monkeypatch.setattr(floor, "MOST_VECTORS", 800)
    monkeypatch.setattr(floor, "LEAST_VECTORS", 100)
    monkeypatch.setattr(floor, "BLOCK", 100)
    sample = patch_floor(grid, colour_images, colour_images, np.random.default_rng(0))
    assert sample == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize(
    "spec",
    [
        families.post((1, 16, 16), latent_size=4),
        families.residual((1, 16, 16), 8, 1, 4, depth=2, num_codes=4),
        families.residual((1, 16, 16), 8, 1, 4, num_codes=2048),
    ],
    ids=["no places", "several tokens for a place", "fewer patches than codes"],
)
def test_a_model_that_has_no_floor_is_measured_without(spec):
    images = np.zeros((3, 1, 16, 16), np.uint8)
    assert patch_floor(spec, images, images, np.random.default_rng(0)) is None


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16)])
def test_the_patch_of_one_latent_is_the_whole_image(shape):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (4, *shape), np.uint8)
    images = kinds[rng.integers(0, 4, 60)]
    spec = families.post(shape, num_codes=4, likelihood="gaussian")
    assert patch_floor(spec, images, images, rng) == pytest.approx(0, abs=1e-6)


def test_equal_patches_have_a_floor(grid):
    images = np.full((4, 3, 16, 16), 255, np.uint8)
    assert patch_floor(grid, images, images, np.random.default_rng(0)) == 0


def test_several_tokens_for_a_patch_are_said(evaluate, tmp_path, colour_file):
    spec = families.residual((3, 16, 16), 8, 1, 4, depth=2, num_codes=8, code_size=4)
    write_model(tmp_path / "deep.pt", small_model(spec))
    said = evaluate(tmp_path / "deep.pt", "--data", colour_file)
    assert "no k-means on patches" in said.splitlines()[-1]


def test_a_model_and_images_that_do_not_fit_are_refused(evaluate, model_file, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    np.save(tmp_path / "none.npy", np.zeros((0, 28, 28), np.uint8))
    line = evaluate(model_file, "--data", tmp_path / "x.npy", code=3)
    assert "images of (1, 8, 8), the model's are (1, 28, 28)" in line
    assert "no images" in evaluate(model_file, "--data", tmp_path / "none.npy", code=3)
    np.save(tmp_path / "y.npy", np.zeros((4, 28, 28), np.uint8))
    line = evaluate(
        model_file, "--data", tmp_path / "y.npy", "--held-out", tmp_path / "x.npy", code=3
    )
    assert "x.npy: images of (1, 8, 8), the model's are (1, 28, 28)" in line
    assert "No such file" in evaluate(tmp_path / "no.pt", "--data", tmp_path / "x.npy", code=3)
    assert "--seed" in evaluate(model_file, "--seed", "-1", code=2)
    assert "--resize" in evaluate(model_file, "--resize", "4by4", code=2)
