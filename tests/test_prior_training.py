"""``python -m vqtrain prior``: what it learns, that it continues after a stop, and its file.

A file with a prior is refused unless the prior fits.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, small_model

from vqref import families, prior
from vqref.errors import InputError, ParityError
from vqref.host.interrupts import Interrupted
from vqref.modelfile import Model
from vqref.prior import Prior, transformer
from vqtrain.modelfile import read_model, write_model
from vqtrain.run import priors
from vqtrain.run.folder import RunFolder, latest_state
from vqtrain.run.priors import (
    PriorOptions,
    PriorTrainer,
    PriorWork,
    course_of_prior,
    require_prior_state,
)

TINY = transformer(4, 16, width=16, depth=1, heads=2)
OPTIONS = PriorOptions(epochs=4, batch_size=16, patience=9, learning_rate=3e-3)


def tokens_of(count, seed=0):
    """Returns rows in which each index follows from the one before, with a few exceptions."""
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, 16, (count, 1)) + 3 * np.arange(4)) % 16
    return np.where(rng.random(rows.shape) < 0.1, rng.integers(0, 16, rows.shape), rows)


def trainer(folder, model, options=OPTIONS, state=None, said=None, tokens=None):
    rows = tokens_of(160) if tokens is None else tokens
    course = course_of_prior(TINY, options, model.digest(), "0" * 64)
    work = PriorWork(torch.device("cpu"), RunFolder(folder), (said or []).append, pictures=False)
    return PriorTrainer(TINY, options, model, rows, tokens_of(50, 1), work, course, state)


def test_a_prior_is_learned_and_the_best_is_kept(model, tmp_path):
    said: list[str] = []
    found = trainer(tmp_path / "run", model, said=said).run()
    held_out = [line["held_out"] for line in found.metrics["history"]]
    nats = prior.nats(TINY, found.params, tokens_of(50, 1)).mean()
    assert nats == pytest.approx(min(held_out), rel=1e-5)
    counted = prior.nats(*prior.categorical(tokens_of(160), 16), tokens_of(50, 1)).mean()
    assert nats < counted < 4 * np.log(16) + 1
    assert found.model == model.digest()
    assert all(len(line) <= 80 for line in said)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.metrics["history"]


def test_training_ends_when_held_out_tokens_no_longer_get_cheaper(model, tmp_path, monkeypatch):
    costs = iter([5.0, 4.0, 6.0, 7.0, 1.0])
    monkeypatch.setattr(priors, "measure", lambda module, tokens: next(costs))
    options = dataclasses.replace(OPTIONS, patience=2, epochs=9)
    run = trainer(tmp_path / "run", model, options)
    kept = []
    usual = run._measure

    def measured():
        usual()
        kept.append(run.module.params())

    monkeypatch.setattr(run, "_measure", measured)
    found = run.run()
    assert [line["held_out"] for line in found.metrics["history"]] == [5.0, 4.0, 6.0, 7.0]
    for name, array in found.params.items():
        np.testing.assert_array_equal(array, kept[1][name])


@pytest.mark.parametrize("stop", [3, 10, 17])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(model, tmp_path, monkeypatch, stop):
    whole = trainer(tmp_path / "whole", model).run()
    run = trainer(tmp_path / "run", model)
    taken: list[Any] = []
    usual = run._take

    def take(tokens):
        if len(taken) == stop:
            raise Interrupted(signal.SIGTERM)
        taken.append(1)
        return usual(tokens)

    monkeypatch.setattr(run, "_take", take)
    with pytest.raises(Interrupted, match="saved; the same command goes on"):
        run.run()
    run.work.folder.release()
    state, _, _ = latest_state(tmp_path / "run", lambda state: require_prior_state(state, TINY))
    again = trainer(tmp_path / "run", model, state=state).run()
    for name, array in whole.params.items():
        np.testing.assert_array_equal(array, again.params[name])
    lines = [each.metrics["history"] for each in (whole, again)]
    for line in (*lines[0], *lines[1]):
        line.pop("tokens_per_second")
    assert lines[0] == lines[1]


DAMAGE = {
    "no module": (lambda s: s.pop("module"), "module is missing"),
    "another shape": (lambda s: s["best"].update({"prior.norm.weight": torch.zeros(3)}), "best.pr"),
    "a foreign entry": (lambda s: s.update(x=1), "entry x is not known"),
    "a count that is none": (lambda s: s.update(step=True), "step has bool"),
    "too few lines": (lambda s: s.update(epoch=9), "history has no line for each epoch"),
    "a line without a number": (lambda s: s["history"][0].pop("held_out"), "held_out is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_snapshot_that_does_not_fit_is_named(model, tmp_path, name):
    run = trainer(tmp_path / "run", model, dataclasses.replace(OPTIONS, epochs=1))
    run.run()
    run.work.folder.release()
    state, _, _ = latest_state(tmp_path / "run", lambda state: require_prior_state(state, TINY))
    change, message = DAMAGE[name]
    change(state)
    with pytest.raises(InputError, match=message):
        require_prior_state(state, TINY)


def test_a_module_that_is_not_the_oracles_prior_is_stopped(model, tmp_path, monkeypatch):
    import vqtrain.network

    usual = vqtrain.network.KINDS["layer_norm"]
    monkeypatch.setitem(
        vqtrain.network.KINDS, "layer_norm", lambda *arguments: 1.001 * usual(*arguments)
    )
    with pytest.raises(ParityError, match="the prior disagrees with the oracle: log_prob"):
        trainer(tmp_path / "run", model).run()


@pytest.fixture(scope="module")
def learned(model):
    params = {p.name: np.zeros(p.shape, np.float32) for p in TINY.parameters}
    return Prior(TINY, params, model.digest(), {"seed": 0}, {"held_out": 1.5})


def test_a_prior_is_in_the_models_file_and_comes_back(model, learned, tmp_path):
    write_model(tmp_path / "m.pt", dataclasses.replace(model, prior=learned))
    found = read_model(tmp_path / "m.pt")
    assert found.prior.spec == TINY
    assert (found.prior.training, found.prior.metrics) == ({"seed": 0}, {"held_out": 1.5})
    for name, array in learned.params.items():
        np.testing.assert_array_equal(found.prior.params[name], array)
    assert found.digest() == model.digest()


FOREIGN = {
    "of another model": (lambda p: p["metrics"].update(x=1), "prior is for model"),
    "another codebook": (
        lambda p: p["parameters"]["quantizer.codebook"].__iadd__(1),
        "prior is for model",
    ),
    "other sizes": (
        lambda p: p["prior"].update(
            Prior(
                s := transformer(4, 9, width=4, depth=1, heads=1),
                {q.name: np.zeros(q.shape, np.float32) for q in s.parameters},
                "x",
            ).to_plain()
        ),
        "prior is for 4 indices of 9 codes, the model has 4 of 16",
    ),
    "no table": (lambda p: p.update(prior=[1]), "prior is not a table"),
    "an entry too many": (lambda p: p["prior"].update(x=1), "prior is not a table"),
    "a metric that is no data": (lambda p: p["prior"]["metrics"].update(x=object()), "plain data"),
    "a parameter of float64": (
        lambda p: p["prior"]["parameters"].update({"prior.norm.bias": np.zeros(16)}),
        "float64, expected float32",
    ),
    "a parameter less": (lambda p: p["prior"]["parameters"].pop("prior.norm.bias"), "missing"),
    "a look ahead": (
        lambda p: [r.pop("causal", None) for r in p["prior"]["spec"]["rows"]],
        "not causal",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_prior_that_is_not_the_models_is_refused_in_one_line(model, learned, name):
    plain = dataclasses.replace(model, prior=learned).to_plain()
    plain["parameters"] = {n: array.copy() for n, array in plain["parameters"].items()}
    change, message = FOREIGN[name]
    change(plain)
    with pytest.raises(InputError, match=message) as caught:
        Model.from_plain(plain)
    assert len(str(caught.value).splitlines()) == 1


COMMAND = ("--width", 8, "--depth", 1, "--heads", 1, "--batch-size", 16)


def test_the_command_learns_keeps_its_tokens_and_evaluate_counts_them(
    run, model_file, many_images, tmp_path
):
    np.save(tmp_path / "i.npy", many_images[:200])
    words = ("-m", "vqtrain", "prior", model_file, "--data", "i.npy", "--output", "p.pt", *COMMAND)
    said: list[str] = []
    for _ in range(2):
        done = run(*words, "--epochs", 1)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        said.append(done.stdout)
    assert "tokens: read from runs/tokens/" in said[1]
    assert all(len(line) <= 80 for line in said[0].splitlines())
    pictures = {path.name for path in (tmp_path / "runs/i-prior/pictures").iterdir()}
    assert pictures == {"epoch-001-samples-1.png", "epoch-001-samples-0.8.png"}
    report = (tmp_path / "runs/i-prior/report.html").read_text()
    assert "Finished: the prior of epoch 1 is kept." in report
    (cost,) = re.findall(r'"name":"held out","kind":1,"values":\[([^]]*)\]', report)
    metrics = json.loads((tmp_path / "runs/i-prior/metrics.jsonl").read_text())
    assert float(cost) == metrics["held_out"]
    for part in ("Samples at temperature 1", "Samples at temperature 0.8", "log_probabilities"):
        assert part in report
    assert "python -m vqdeploy export p.pt" in report
    nats = re.search(r"this prior +([\d.]+) nats", said[0])[1]
    assert read_model(tmp_path / "p.pt").prior.metrics["held_out"] == pytest.approx(
        float(nats), abs=0.01
    )
    done = run("-m", "vqtrain", "evaluate", "p.pt", "--data", "i.npy", "--json")
    found = json.loads(done.stdout)
    assert found["uniform_prior"] == pytest.approx(4 * np.log(16))
    assert found["bound"] == pytest.approx(found["reconstruction"] + found["prior"])
    assert found["prior"] != found["uniform_prior"]


def test_one_latent_is_counted_not_trained(run, tmp_path, many_images):
    small = small_model(families.post((1, 28, 28), base_depth=2, num_codes=6, code_size=4))
    write_model(tmp_path / "one.pt", small)
    np.save(tmp_path / "i.npy", many_images[:100])
    done = run("-m", "vqtrain", "prior", "one.pt", "--data", "i.npy")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = read_model(tmp_path / "one.pt").prior
    assert found.spec.kind == "categorical"
    assert "epoch" not in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--width", 10, "--heads", 4), 2, "--width is 10, not a multiple of 4 heads"),
        (("--dropout", 1), 2, "--dropout is 1.0, expected a share below 1"),
        (("--learning-rate", "nan"), 2, "--learning-rate is nan"),
        (("--batch-size", 5000), 3, "fewer than one batch of 5000"),
        (("--output", "no/where.pt"), 5, "no/where.pt"),
    ],
)
def test_what_cannot_be_is_one_line(
    refused, model_file, tmp_path, many_images, words, code, message
):
    np.save(tmp_path / "i.npy", many_images[:60])
    said = refused(code, "-m", "vqtrain", "prior", model_file, "--data", "i.npy", *words)
    assert message in said


def test_a_signal_saves_and_the_same_command_goes_on(model_file, many_images, tmp_path):
    np.save(tmp_path / "i.npy", many_images)
    words = ("-m", "vqtrain", "prior", model_file, "--data", "i.npy", "--output", "p.pt", *COMMAND)
    command = [sys.executable, *map(str, words), "--epochs", "3000", "--patience", "3000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for line in process.stdout:
        if line.split()[:1] == ["2"]:
            break
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "saved; the same command goes on" in said
    assert not (tmp_path / "p.pt").exists()
