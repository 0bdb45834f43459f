"""Measuring: the figures are their definitions, and the clustering floor is one."""

import json

import numpy as np
import pytest

import vqref
from vqref.images import to_unit_interval
from vqtrain.floor import clustering_floor


@pytest.fixture
def data(tmp_path, many_images):
    folder = tmp_path / "kmnist"
    folder.mkdir()
    np.savez(folder / "kmnist-train-imgs.npz", many_images[:300])
    np.savez(folder / "kmnist-test-imgs.npz", many_images[300:400])
    return folder


def test_evaluate_prints_each_figure_with_what_it_means(run, model_file, model, data, many_images):
    done = run("-m", "vqtrain", "evaluate", model_file, "--data", data)
    assert done.returncode == 0, done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[1:])
    assert "on 100 held-out images of kmnist-train-imgs.npz" in done.stdout
    out = vqref.forward(model.spec, model.params, to_unit_interval(many_images[300:400, None]))
    assert f"reconstruction     {out.losses.reconstruction:>9.2f}  nats an image to send the pixels" in done.stdout
    found = json.loads(run("-m", "vqtrain", "evaluate", model_file, "--data", data, "--json").stdout)
    assert found["bound"] == pytest.approx(out.losses.bound, rel=1e-5)
    assert found["bits_per_dimension"] == pytest.approx(out.losses.bound / np.log(2) / 784, rel=1e-5)
    assert found["codes_used"] == len(np.unique(out.indices))
    assert "clustering_floor" not in found  # four latents: one table of pictures is no floor


def test_binarized_images_are_drawn_by_their_grey_levels(run, model_file, data):
    command = ("-m", "vqtrain", "evaluate", model_file, "--data", data, "--json")
    plain, drawn, again = (json.loads(run(*command, *more).stdout) for more in ((), ("--binarize",), ("--binarize",)))
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
    entropy = -(held_out * np.log(mean) + (1 - held_out) * np.log1p(-mean)).sum(axis=(1, 2, 3)).mean()
    assert one == pytest.approx(entropy, rel=0.02)


def test_more_prototypes_lower_the_floor(many_images):
    images = to_unit_interval(many_images[:, None])
    floors = [clustering_floor(images[:800], images[800:], k, np.random.default_rng(0)) - np.log(k) for k in (1, 4, 16)]
    assert floors[0] > floors[1] > floors[2]


def test_a_model_and_images_that_do_not_fit_are_refused(refused, model_file, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    line = refused(3, "-m", "vqtrain", "evaluate", model_file, "--data", "x.npy")
    assert "images of (1, 8, 8), the model's are (1, 28, 28)" in line
    assert "No such file" in refused(3, "-m", "vqtrain", "evaluate", "nowhere.pt", "--data", "x.npy")
