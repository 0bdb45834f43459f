"""Long work shows its progress: a bar on a terminal, else a line every half minute."""

import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import ROOT, trainer

import vqtrain
import vqtrain.run.trainer
from vqtrain.run import progress
from vqtrain.run.metrics import Meter
from vqtrain.run.progress import Progress, counting, duration
from vqtrain.run.rules import Rules

LINE = re.compile(
    r"epoch (\d)/2: step (\d) of 4, bound \d+\.\d, \d+(\.\d\d)? images/s, about \d+ s left"
)
MEASURING = re.compile(r"epoch (\d)/2: (\d+) of 32 images measured, about \d+ s left")

DRIVER = """
import sys
import vqtrain.run.progress
from vqtrain.__main__ import main
vqtrain.run.progress.SECONDS = float(sys.argv.pop(1))
sys.exit(main(sys.argv[1:]))
"""

SMALL = ("--batch-size", "32", "--base-depth", "2", "--num-codes", "8", "--check-images", "4")


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock that progress reads; each training step takes ten seconds."""
    clock, step = Clock(), vqtrain.run.step.training_step

    def ten_seconds(*arguments):
        clock.now += 10
        return step(*arguments)

    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(vqtrain.run.trainer, "training_step", ten_seconds)
    return clock


def lines_of(said):
    """Returns, for each line within an epoch, how far the run was and how long it would take."""
    pattern = r"(epoch \d/\d: step \d of \d), bound \d+\.\d, (.*)"
    return [found.groups() for line in said if (found := re.fullmatch(pattern, line))]


def test_a_line_comes_every_half_minute_and_tells_the_rate_and_what_is_left(
    clock, tmp_path, many_images
):
    assert progress.SECONDS == 30
    said: list[str] = []
    trainer(tmp_path, many_images, said).run()  # two epochs of five steps
    assert lines_of(said) == [
        ("epoch 1/2: step 3 of 5", "3.20 images/s, about 70 s left"),
        ("epoch 2/2: step 3 of 5", "3.20 images/s, about 20 s left"),
    ]


def test_the_bound_is_the_mean_over_the_epoch_so_far(clock, tmp_path, many_images, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 50.0)
    said: list[str] = []
    run = trainer(tmp_path, many_images, said)
    first = run.run().metrics["history"][0]
    line = next(line for line in said if line.startswith("epoch 1/2: step 5 of 5"))
    assert f", bound {first['bound']:.1f}, " in line


def test_the_time_left_counts_what_follows_the_steps_of_an_epoch(
    clock, tmp_path, many_images, monkeypatch
):
    evaluate = vqtrain.run.metrics.evaluate

    def a_minute(*arguments):
        clock.now += 60
        return evaluate(*arguments)

    monkeypatch.setattr(vqtrain.run.trainer, "evaluate", a_minute)
    said: list[str] = []
    trainer(tmp_path, many_images, said, epochs=3).run()
    assert [left.split("about ")[1] for _, left in lines_of(said)] == [
        "2 min left",  # 12 steps; the time of an epoch's end is not known yet
        "3 min left",  # 7 steps and two ends: 190 s
        "80 s left",  # 2 steps and one end
    ]


def test_the_start_of_the_codebook_is_no_step(clock, tmp_path, many_images, monkeypatch):
    def slow(self, model, batches, ranks):
        clock.now += 100

    monkeypatch.setattr(Rules, "start", slow)
    said: list[str] = []
    trainer(tmp_path, many_images, said, kmeans_start=True, plain_steps=1).run()
    assert lines_of(said)[0] == ("epoch 1/2: step 2 of 5", "3.20 images/s, about 80 s left")


def test_a_run_that_goes_on_counts_its_own_steps(monkeypatch):
    clock = Clock()
    said: list[str] = []
    monkeypatch.setattr(progress, "time", clock)
    state: Any = SimpleNamespace(
        epoch=1, step=300, meter=SimpleNamespace(read=lambda: SimpleNamespace(bound=271.34))
    )
    options: Any = SimpleNamespace(epochs=20, batch_size=32)
    steps: Any = iter(range(100))
    shown = Progress(state, options, 400, said.append, bar=False)
    clock.now += 1000  # checks before the first step
    for _ in shown.steps(steps):
        clock.now += 1
        state.step += 1
    assert said[0] == (
        "epoch 2/20: step 330 of 400, bound 271.3, 32 images/s, about 2.0 h left"
    )  # 70 and 18 * 400 steps
    assert len(said) == 3
    assert len(said[0]) <= 80


def test_lines_in_long_measuring_say_how_many_images_are_done(monkeypatch):
    clock = Clock()
    said: list[str] = []
    monkeypatch.setattr(progress, "time", clock)
    measured = counting(said.append, "epoch 3/20", 1000)
    for count in range(100, 1001, 100):
        clock.now += 20
        measured(count)
    assert said == [
        "epoch 3/20: 200 of 1000 images measured, about 3 min left",
        "epoch 3/20: 400 of 1000 images measured, about 2 min left",
        "epoch 3/20: 600 of 1000 images measured, about 80 s left",
        "epoch 3/20: 800 of 1000 images measured, about 40 s left",
        "epoch 3/20: 1000 of 1000 images measured, about 0 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_a_duration_has_the_unit_that_people_use(seconds, text):
    assert duration(seconds) == text


def test_without_a_line_the_losses_are_read_once_an_epoch(tmp_path, many_images, monkeypatch):
    """Reading them would wait for a card."""
    read, count = Meter.read, []

    def counted(self, *arguments):
        count.append(len(arguments))
        return read(self, *arguments)

    monkeypatch.setattr(Meter, "read", counted)
    trainer(tmp_path, many_images).run()
    assert count == [0, 2, 0, 2]  # the epoch, and the measured images


def test_a_bar_reads_the_losses_every_half_second(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, read, screen = Clock(), [], Terminal()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(sys, "stderr", screen)

    def losses():
        read.append(round(clock.now - 1000, 1))
        return SimpleNamespace(bound=271.34, commitment=0.5)

    state: Any = SimpleNamespace(epoch=0, step=0, meter=SimpleNamespace(read=losses))
    options: Any = SimpleNamespace(epochs=2)
    steps: Any = iter(range(10))
    shown = Progress(state, options, 10, print, bar=True)
    for _ in shown.steps(steps):
        clock.now += 0.2
    assert read == [0.6, 1.2, 1.8]
    assert "epoch 1/2" in screen.getvalue()


@pytest.fixture
def place(tmp_path, many_images):
    """A folder with 128 images to train on (four steps of 32) and 32 held-out ones."""
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "kmnist-train-imgs.npz", many_images[:128])
    np.savez(tmp_path / "data" / "kmnist-test-imgs.npz", many_images[128:160])
    return tmp_path


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}


def go(place, seconds, *arguments, **streams):
    """Runs the command with this time between two lines."""
    words = (sys.executable, "-c", DRIVER, str(seconds), *arguments)
    return subprocess.Popen(
        words, cwd=place, env=environment(), stdout=subprocess.PIPE, text=True, **streams
    )


def test_a_log_has_lines_and_no_bar(place):
    run = ("--data", "data", "--epochs", "2", *SMALL, "--json")
    process = go(place, 0.0, *run, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    steps = [found.groups()[:2] for line in lines if (found := LINE.fullmatch(line))]
    assert steps == [(epoch, step) for epoch in "12" for step in "1234"]
    assert sum(MEASURING.fullmatch(line) is not None for line in lines) == 2
    assert all(len(line) <= 80 for line in lines[:-1])
    assert json.loads(lines[-1])["epoch"] == 2
    assert re.search(r"1/2: step 4 of 4,.*\nepoch 1/2: 32 of 32.*\n    1 ", out)


def test_a_short_run_has_none(place):
    process = go(place, progress.SECONDS, "--data", "data", "--epochs", "2", *SMALL)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert not [line for line in out.splitlines() if " left" in line]


SILENT = """
import sys
import numpy as np
import vqtrain
import vqtrain.run.progress
vqtrain.run.progress.SECONDS = 0.0
images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)
options = {"epochs": 1, "base_depth": 2, "num_codes": 8, "batch_size": 32, "check_images": 4}
vqtrain.train(images, held_out=0, say=SAY, **options)
"""


@pytest.mark.parametrize(
    ("code", "lines", "bar"),
    [
        (DRIVER, 0, True),
        (SILENT.replace("SAY", "None"), 0, False),
        (SILENT.replace("SAY", "print"), 4, False),  # two steps, two batches
    ],
    ids=["the command line", "a silent call", "a call that says"],
)
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_has_either_a_bar_or_lines(place, code, lines, bar):
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words = ("0.0", "--data", "data", "--epochs", "1", *SMALL)
    process = subprocess.Popen(
        (sys.executable, "-c", code, *words),
        cwd=place,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    drawn = b""
    try:
        while piece := os.read(ours, 2**16):
            drawn += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    out, _ = process.communicate()
    assert process.returncode == 0, drawn
    assert sum(" left" in line for line in out.splitlines()) == lines
    assert (b"epoch 1/1" in drawn, bool(drawn)) == (bar, bar)


def test_evaluate_says_how_far_it_is_but_not_in_json(place, model_file):
    run = ("evaluate", str(model_file), "--data", "data")
    process = go(place, 0.0, *run)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.splitlines()[0] == "evaluate: 32 of 32 images measured, about 0 s left"
    process = go(place, 0.0, *run, "--json")
    out, _ = process.communicate()
    assert json.loads(out)["images"] == 32
