"""Benchmarks: tables of stored figures, runs in turns, workers that answer or say why not."""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import BLOCK, README, RESULTS, commands, tables
from benchmarks.large_codebooks import wasserstein
from benchmarks.measure import ROOT, Record, Worker, in_turns, summary


def test_the_tables_in_readme_are_the_stored_figures():
    text = README.read_text()
    assert tables(text) == text
    named = {found[2] for found in BLOCK.finditer(text)}
    assert named == {path.stem for path in RESULTS.glob("*.json")}
    for name in named:
        stored = json.loads((RESULTS / f"{name}.json").read_text())
        assert set(stored) == {"command", "date", "machine", "printed", "figures"}
        assert stored["machine"]["processor"]
        assert stored["figures"]


def asked(**changes):
    """Returns the runner's arguments: a model and the changes, nothing else."""
    nothing = {"data": None, "colour": None, "grid": None, "tensorflow": None, "triton": None}
    return argparse.Namespace(**{**nothing, "model": Path("m"), "short": True, **changes})


def test_a_grid_is_judged_beside_its_images_if_both_are_given(tmp_path):
    for name in ("emoji-train.npz", "emoji-test.npz"):
        (tmp_path / name).touch()
    words = commands(asked(grid=Path("g"), colour=tmp_path), [])["agreement"]
    assert words[:3] == ["--model", "m", "g"]
    assert words[3:5] == ["--data", str(tmp_path / "emoji-train.npz")]
    assert "--data" not in commands(asked(grid=Path("g")), [])["agreement"]


def test_benchmarks_whose_images_are_not_given_are_left_out():
    without, with_data = commands(asked(), []), commands(asked(data=Path("d")), [])
    assert set(with_data) - set(without) == {"quality", "advance"}
    assert "grids" in commands(asked(colour=Path("c")), [])
    assert "grids" not in with_data


def test_every_benchmark_of_the_runner_is_a_module_with_a_table(tmp_path):
    for name in ("emoji-train.npz", "emoji-test.npz"):
        (tmp_path / name).touch()
    found = commands(asked(data=Path("d"), colour=tmp_path, grid=Path("g"), triton="t"), [])
    assert set(found) == {match[2] for match in BLOCK.finditer(README.read_text())}
    paths = [ROOT / "benchmarks" / f"{name.replace('.', '/')}.py" for name in found]
    assert all(path.exists() for path in paths)


def test_runs_take_turns():
    order: list[str] = []

    def turn(name):
        order.append(name)
        return float(len(order))

    found = in_turns({name: functools.partial(turn, name) for name in "ab"}, rounds=3)
    assert order == list("ab" + "ababab")
    assert found == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert summary(found["a"])["median"] == 5.0


def test_a_worker_answers_and_one_that_cannot_says_why():
    worker = Worker("benchmarks.nearest", "serve", "ours", "256", "64")
    assert worker() > 0
    assert worker.grown >= 0
    worker.close()
    with pytest.raises(RuntimeError, match="KeyError: 'no such kind'"):
        Worker("benchmarks.nearest", "serve", "no such kind", "1", "1")


def test_a_record_holds_what_was_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["benchmarks/nearest.py", "--rounds", "3", "--json", str(tmp_path / "x" / "r.json")],
    )
    record = Record(argparse.Namespace(json=tmp_path / "x" / "r.json"))
    record.say("one line")
    record.figures["seconds"] = 1.5
    record.write()
    stored = json.loads((tmp_path / "x" / "r.json").read_text())
    assert stored["printed"] == capsys.readouterr().out.splitlines()
    assert stored["command"] == "python -m benchmarks.nearest --rounds 3"
    assert stored["figures"] == {"seconds": 1.5}


def test_the_distance_of_latents_and_rows_is_that_of_their_means_and_deviations():
    """For rows moved by v, it is |v|² per element; for twice the deviation, the variance."""
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double()
    rows = rows - rows.mean(dim=0)
    assert wasserstein(rows, rows).item() == pytest.approx(0, abs=1e-6)
    assert wasserstein(rows, rows + 2).item() == pytest.approx(4, rel=1e-4)
    variance = rows.square().mean().item()
    assert wasserstein(rows, 2 * rows).item() == pytest.approx(variance, rel=1e-4)


def test_whole_epochs_run_on_the_processor():
    command = ["-m", "benchmarks.epochs", "--images", "128", "--epochs", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "ours, bfloat16" in done.stdout
    assert "plain loop, DataLoader" in done.stdout
