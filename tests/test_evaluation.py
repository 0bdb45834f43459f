"""Measuring: a figure stands beside what it means, and beside what no network would reach."""

import json

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2, vq
from support import small_model

import vqref
from vqref import families
from vqref.host.images import to_unit_interval
from vqtrain.__main__ import main
from vqtrain.commands.evaluate import MEANING
from vqtrain.modelfile import write_model
from vqtrain.run import floor
from vqtrain.run.floor import clustering_floor, patch_floor


@pytest.fixture
def evaluate(capsys):
    """Runs the command, which must end with ``code``, and returns what it says: a refusal in one
    line."""

    def said(*arguments: object, code: int = 0) -> str:
        try:
            found = main(["evaluate", *map(str, arguments), "--device", "cpu"])
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
    assert not {"clustering_floor", "patches_nmse"} & set(found)  # four latents without a place


def test_a_grid_stands_beside_k_means_on_patches(
    evaluate, residual_file, residual_model, colour_file, colour_images
):
    heading, *lines = evaluate(residual_file, "--data", colour_file).splitlines()
    assert heading.endswith("on 300 images of colour.npy, floors too, cpu")
    assert all(len(line) <= 80 for line in lines)
    found = json.loads(evaluate(residual_file, "--data", colour_file, "--json"))
    spec = residual_model.spec
    error = patch_floor(spec, colour_images, colour_images, np.random.default_rng(0))
    assert found["patches_nmse"] == pytest.approx(error / spec.variance)
    assert found["patches_psnr"] == pytest.approx(-10 * np.log10(error))
    assert found["nmse"] > found["patches_nmse"]  # untrained


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
    """Patches (n, C * size * size) of images (N, C, H, W), by slices."""
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
    assert min(errors) * 0.97 < found < max(errors) * 1.03  # local optima, as theirs are


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
    assert "No such file" in evaluate(tmp_path / "no.pt", "--data", tmp_path / "x.npy", code=3)
    assert "--seed" in evaluate(model_file, "--seed", "-1", code=2)
    assert "--resize" in evaluate(model_file, "--resize", "4by4", code=2)
