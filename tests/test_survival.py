"""What a run survives: signals, kills, damaged snapshots, a full disk, a second run.

Signals come in every phase, kills at any moment.
"""

import dataclasses
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support import ROOT, SPEC, Trap, stop_in_step, trainer

import vqtrain.run.trainer
from vqref import families
from vqref.errors import InputError, UsageError
from vqref.host.interrupts import Interrupted
from vqtrain import TrainingOptions
from vqtrain.modelfile import read_model
from vqtrain.run.folder import RunFolder, latest_state
from vqtrain.run.snapshot import (
    course_of,
    differences,
    list_states,
    load_state,
    require_same_course,
    save_state,
)

RUN = (
    *("-m", "vqtrain", "--data", "data", "--epochs", "3", "--batch-size", "16"),
    *("--snapshot-steps", "2", "--name", "r", "--base-depth", "2", "--num-codes", "8"),
)


@pytest.fixture
def place(tmp_path, many_images):
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "kmnist-train-imgs.npz", many_images[:128])
    np.savez(tmp_path / "data" / "kmnist-test-imgs.npz", many_images[128:160])
    return tmp_path


@pytest.fixture
def go(run, place):
    """Runs the command (or another one) with more options."""

    def python(*more: str, words=RUN) -> subprocess.CompletedProcess[str]:
        return run(*words, *more, cwd=place)

    return python


def parameters(path):
    return read_model(path).params


def same(a, b) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


EVERY_RULE = {
    "plain_steps": 1,
    "kmeans_start": True,
    "temperature": 0.3,
    "revive_below": 0.5,
    "cosine": True,
}


RECIPES = {"post": {}, "every rule": EVERY_RULE, "sonnet": {"dialect": "sonnet"}}


@pytest.fixture(scope="module", params=list(RECIPES.values()), ids=list(RECIPES))
def whole(request, tmp_path_factory, many_images):
    """A recipe, and the result of a run of it that was not stopped."""
    run = trainer(tmp_path_factory.mktemp("whole"), many_images, **request.param)
    return request.param, run.run()


@pytest.mark.parametrize("when", [1, 5, 7])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(
    tmp_path, many_images, monkeypatch, when, whole
):
    recipe, undisturbed = whole
    stop_in_step(monkeypatch, when)
    stopped = trainer(tmp_path, many_images, **recipe)
    with pytest.raises(Interrupted, match=rf"epoch {1 + (when - 1) // 5}, step") as caught:
        stopped.run()
    assert caught.value.exit_code == 143
    stopped.work.folder.release()
    state, _, _ = latest_state(tmp_path / "run")
    assert (
        5 * state["epoch"] + state["step"] == when
    )  # the current step is finished, and no other begins
    monkeypatch.undo()
    resumed = trainer(tmp_path, many_images, state=state, **recipe).run()
    assert same(resumed.params, undisturbed.params)
    drop = "images_per_second"
    lines = [
        [{k: v for k, v in line.items() if k != drop} for line in m.metrics["history"]]
        for m in (resumed, undisturbed)
    ]
    assert lines[0] == lines[1]


PHASES = {
    "loading": ("vqtrain.commands.train.load_source", 143, False),
    "checking": ("vqtrain.run.trainer.check_against_oracle", 143, True),
    "training": ("vqtrain.run.trainer.training_step", 143, True),
    "evaluation": ("vqtrain.run.trainer.evaluate", 143, True),
    "drawing": ("vqtrain.run.webreport.page_of", 143, True),
    "saving": ("vqtrain.run.trainer.save_state", 143, True),
    "publishing": ("vqtrain.run.trainer.write_model", 143, True),
}
SABOTAGE = """
import os, signal, sys
from importlib import import_module
from vqtrain.__main__ import main
where, _, name = sys.argv.pop(1).rpartition(".")
module = import_module(where)
original = getattr(module, name)
def signalling(*arguments, **options):
    setattr(module, name, original)
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **options)
setattr(module, name, signalling)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_any_phase_saves_and_exits_143(place, phase, go):
    target, code, saved = PHASES[phase]
    done = go(words=("-c", SABOTAGE, target, *RUN[2:]))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert ("and saved; the same command goes on" in done.stderr) is saved
    assert bool(list_states(place / "runs" / "r" / "snapshots")) is saved
    again = RUN
    if phase == "drawing":  # the first epoch is done, and its report says how to continue
        report = (place / "runs/r/report.html").read_text()
        said = re.search(r"<code>python (.* --resume .*)</code>", report)
        assert said is not None
        again = tuple(said[1].split())
    assert go(words=again).returncode == 0
    assert (place / "model.pt").exists()


def test_a_signal_while_the_model_is_published_does_not_promise_to_go_on(go):
    target = "vqtrain.run.trainer.write_file"
    done = go(words=("-c", SABOTAGE, target, *RUN[2:]))
    assert done.returncode == 143
    assert done.stderr == "vqtrain: interrupted at its end; model.pt is written\n"
    assert "is finished" in go().stderr


def test_kills_at_random_moments_lose_no_snapshot_and_end_at_the_same_bits(place, go):
    """Tries a few; ``python -m benchmarks.kills`` tries as many as you like."""

    def begun(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *RUN, *more],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    start = time.monotonic()
    assert begun("--name", "whole", "--output", "whole.pt").wait() == 0
    whole = time.monotonic() - start
    rng = np.random.default_rng(0)
    reached, kills = 0, 0
    for _ in range(6):
        process = begun()
        time.sleep(rng.uniform(0.1, 0.5) * whole)  # the machine may be busier now than later
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        found = latest_state(place / "runs" / "r") if (place / "runs" / "r").exists() else None
        if found:
            state, _, complaints = found
            assert not complaints
            now = 8 * state["epoch"] + state["step"]
            assert now >= reached
            reached = now
    if not (place / "model.pt").exists():
        assert go().returncode == 0
    assert kills
    assert same(parameters(place / "model.pt"), parameters(place / "whole.pt"))


def damage(path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "bit-flipped"])
def test_a_damaged_snapshot_falls_back_under_auto_and_stops_an_explicit_path(place, how, go):
    assert go("--epochs", "3").returncode == 0
    newest, previous = list_states(place / "runs" / "r" / "snapshots")
    damage(newest, how)
    explicit = go("--resume", f"runs/r/snapshots/{newest.name}")
    assert (explicit.returncode, len(explicit.stderr.splitlines())) == (3, 1)
    assert f"{newest.name}: damaged: its sha256" in explicit.stderr
    auto = go()
    assert auto.returncode == 0
    assert f"skipped: runs/r/snapshots/{newest.name}: damaged" in auto.stdout
    assert f"going on from runs/r/snapshots/{previous.name}" in auto.stdout
    for path in list_states(place / "runs" / "r" / "snapshots"):
        damage(path, how)
    nothing_left = go()
    assert (nothing_left.returncode, len(nothing_left.stderr.splitlines())) == (3, 1)


def test_a_changed_option_is_named_and_refused(go):
    assert go("--epochs", "1").returncode == 0
    changed = go("--epochs", "1", "--decay", "0.9")
    assert changed.returncode == 2
    said = "vqtrain: runs/r was begun with decay 0.985, not 0.9"
    assert changed.stderr == f"{said}; use the same options, or another --name\n"
    narrower = go("--epochs", "1", "--base-depth", "1")
    assert narrower.stderr.startswith("vqtrain: runs/r was begun with base_depth 2, not 1; use")
    explicit = go("--epochs", "1", "--decay", "0.9", "--resume", "runs/r")
    assert (explicit.returncode, explicit.stderr) == (2, changed.stderr)


def test_a_finished_run_is_not_trained_again_and_never_overwritten(go):
    assert go("--epochs", "1").returncode == 0
    again = go("--epochs", "1")
    assert (again.returncode, again.stderr) == (
        3,
        "vqtrain: runs/r: is finished; use another --name\n",
    )
    never = go("--epochs", "1", "--resume", "never")
    assert (never.returncode, never.stderr) == (
        3,
        "vqtrain: runs/r: exists already; use another --name\n",
    )


def test_without_a_name_a_finished_or_different_run_gets_the_next_folder(place, go):
    unnamed = [word for word in RUN if word not in ("--name", "r")]
    for extra in (["--epochs", "1"], ["--epochs", "1"], ["--epochs", "1", "--seed", "4"]):
        assert go(*extra, words=unnamed).returncode == 0
    assert sorted(path.name for path in (place / "runs").iterdir()) == [
        "kmnist-default",
        "kmnist-default-2",
        "kmnist-default-3",
    ]


def test_two_runs_cannot_share_a_folder(place, go):
    folder = RunFolder(place / "runs" / "r")
    done = go()
    folder.release()
    assert (done.returncode, done.stderr) == (
        5,
        "vqtrain: runs/r: another run is at work in this folder\n",
    )


def test_options_of_a_run_begin_the_same_run_again(place, go):
    assert go("--epochs", "1", "--learning-rate", "0.002").returncode == 0
    config = ("--config", "runs/r/options.toml", "--name", "again", "--output", "b.pt")
    again = go(*config, words=RUN[:2])
    assert again.returncode == 0, again.stderr
    assert same(parameters(place / "model.pt"), parameters(place / "b.pt"))
    first, second = (
        (place / "runs" / name / "options.toml").read_text().splitlines() for name in ("r", "again")
    )
    assert [line for line in first if "output" not in line] == [
        line for line in second if "output" not in line
    ]


def test_a_config_that_names_an_unknown_option_is_refused(place, go):
    (place / "c.toml").write_text("[training]\nepoch = 3\n")
    done = go("--config", "c.toml")
    assert (done.returncode, done.stderr) == (
        3,
        "vqtrain: c.toml: unknown option epoch; did you mean --epochs?\n",
    )
    (place / "c.toml").write_text("epochs = = 3")
    assert "c.toml: not TOML" in go("--config", "c.toml").stderr


def test_a_full_disk_loses_nothing(tmp_path, many_images, monkeypatch):
    run = trainer(tmp_path, many_images, work={"snapshot_steps": 2})

    def full(_):
        raise OSError(28, "No space left on device")

    step = vqtrain.run.step.training_step

    def filling(*arguments):
        if (run.state.epoch, run.state.step) == (1, 3):
            monkeypatch.setattr(os, "fsync", full)
        return step(*arguments)

    monkeypatch.setattr(vqtrain.run.trainer, "training_step", filling)
    with pytest.raises(OSError, match="No space left"):
        run.run()
    monkeypatch.undo()
    assert read_model(tmp_path / "run" / "model.pt").metrics["epoch"] == 1
    state, _, complaints = latest_state(tmp_path / "run")
    assert (5 * state["epoch"] + state["step"], complaints) == (7, [])
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_states_keep_the_last_two_and_read_back_what_was_saved(tmp_path):
    for step in (1, 20, 3):
        save_state(tmp_path, step, {"step": step, "x": torch.arange(3)})
    assert [path.name for path in list_states(tmp_path)] == [
        "step-00000020.state",
        "step-00000003.state",
    ]
    found = load_state(tmp_path / "step-00000020.state")
    assert found["step"] == 20
    assert torch.equal(found["x"], torch.arange(3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a snapshot of vqtrain"),
        (b"vqtrain-state 1 abc\n", "a snapshot of another format version"),
        (b"vqtrain-state 2 abc\nxyz", "damaged: its sha256"),
    ],
)
def test_bytes_that_are_no_state_are_refused(tmp_path, content, message):
    (tmp_path / "x.state").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_state(tmp_path / "x.state")


def test_a_state_that_carries_code_is_refused_and_nothing_runs(tmp_path):
    path = save_state(tmp_path, 1, {"trap": Trap(tmp_path / "sprung")})
    with pytest.raises(
        InputError, match="refused: its payload is not plain data; nothing was executed"
    ):
        load_state(path)
    assert not (tmp_path / "sprung").exists()


def test_a_resumed_state_of_another_course_is_named(tmp_path, many_images):
    run = trainer(tmp_path, many_images, epochs=1)
    run.run()
    run.work.folder.release()
    state, _, _ = latest_state(tmp_path / "run")
    require_same_course(tmp_path / "run", run.course, state)
    nine = families.post((1, 28, 28), base_depth=4, latent_size=2, num_codes=9, code_size=4)
    other = course_of(nine, run.options, {}, "0" * 64)
    with pytest.raises(UsageError, match=r"was begun with num_codes 8, not 9; use"):
        require_same_course(tmp_path / "run", other, state)


def test_a_network_whose_rows_changed_under_the_same_sizes_is_another_course():
    """Another version of the toolkit may have written a family in another way."""
    options = TrainingOptions()
    layer = dataclasses.replace(SPEC.decoder[-1], activation="relu")
    changed = dataclasses.replace(SPEC, decoder=(*SPEC.decoder[:-1], layer))
    ours, theirs = (course_of(spec, options, {}, "0" * 64) for spec in (SPEC, changed))
    assert [phrase.split()[0] for phrase in differences(ours, theirs)] == ["rows"]


def test_a_state_holds_the_updates_that_a_debiased_average_has_had(tmp_path, many_images):
    run = trainer(tmp_path, many_images, dialect="sonnet", work={"snapshot_steps": 2})
    run.run()
    run.work.folder.release()
    (tmp_path / "b").mkdir()
    state = load_state(list_states(tmp_path / "run" / "snapshots")[0])
    again = trainer(tmp_path / "b", many_images, dialect="sonnet", state=state)
    assert state["quantizer_steps"] == again.model.quantizer.steps == 10
