"""``python -m benchmarks.ranks [--kills N]``: compares training on several ranks and on one.

Compares the state after fifty steps in float64, measures what a step sends, and predicts from that
the times on cards. Kills a random rank under torchrun N times. Each kill must leave a whole
snapshot and soon end the other ranks, with one line. All ranks are on this machine, so its times
say nothing about scaling. The volume sent does, with a card's time per step from
``benchmarks/results``.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from benchmarks.joint_steps import fifty_steps_of_each, off
from benchmarks.kills import ENVIRONMENT, equal, training, write_images
from benchmarks.measure import ROOT, Record, parser
from vqref import families
from vqref.spec import NETWORKS, ModelSpec
from vqtrain.options import RECIPES, TrainingOptions
from vqtrain.run.folder import SNAPSHOTS, latest_state
from vqtrain.run.rules import Rules
from vqtrain.run.snapshot import list_states

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")

MEASURED = {"post": (32, 32 / 29_400), "residual 32x32": (32, 32 / 3_400)}
"""Images of a step on an H200 in bfloat16, and its seconds, from
benchmarks/results/cuda-h200-*.txt."""

CARDS = 8
"""The number of cards in a machine."""

NVLINK, NETWORK = (300e9, 5e-6), (40e9, 15e-6)
"""Bytes per second that a card sends within a machine (NVLink 4, less a third for protocols) and to
other machines (400 Gbit/s, less a fifth); and seconds until another card has the first byte."""

WAIT = 300.0
"""Seconds within which a rank must begin, and within which all must end."""

AS_RANK = """
import json, os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)  # it is the run's to answer
place = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
run = subprocess.Popen([sys.executable, *sys.argv[2:]], stderr=subprocess.PIPE, text=True)
place.with_suffix(".pid").write_text(str(run.pid))
said = run.communicate()[1].splitlines()
found = {"code": run.returncode, "said": said, "when": time.time()}
place.with_suffix(".json").write_text(json.dumps(found))
sys.exit(run.returncode % 256)
"""
"""A process between torchrun and a rank, which notes how the rank ends."""


def networks() -> dict[str, ModelSpec]:
    """Returns the networks whose volume is counted, with their families' sizes."""
    return {
        "post": families.post(),
        "residual 32x32": families.residual((3, 32, 32)),
        "residual 256x256, 16,384 codes": families.residual(
            (3, 256, 256), downsample=8, num_codes=16_384
        ),
    }


def sent(spec: ModelSpec, batch: int) -> int:
    """Returns how many numbers ranks add up in a step in which codes may be revived.

    These are a gradient per parameter, hits and sums for the averages, and the latents that dead
    codes would take.
    """
    learned = sum(math.prod(p.shape) for p in spec.parameters if p.name.split(".")[0] in NETWORKS)
    codes, size = spec.num_codes, spec.code_size
    return learned + codes + codes * size + min(codes, batch * spec.latent_size) * size


def added_up(volume: float, ranks: int) -> float:
    """Returns the seconds in which ``ranks`` cards add up this many bytes.

    There is a ring within each machine. Across machines, each card's share of the bytes goes
    through a tree.
    """
    inside, machines = min(ranks, CARDS), -(-ranks // CARDS)
    near = 2 * (inside - 1) * (volume / inside / NVLINK[0] + NVLINK[1])
    share = volume / inside
    far = 2 * (machines - 1) / machines * share / NETWORK[0]
    return near + far + 2 * math.ceil(math.log2(machines)) * NETWORK[1]


def tell_deviations(record: Record) -> None:
    """Compares fifty steps in float64 of several ranks with those of one."""
    alone = fifty_steps_of_each()
    record.say(f"{'50 steps, float64':<20}{'ranks':>6}{'passes':>7}{'off by':>10}  ranks equal")
    found = record.figures["deviations"] = {}
    for ranks, passes in ((1, 3), (2, 1), (4, 1), (2, 2)):
        with tempfile.TemporaryDirectory() as folder:
            words = [*TORCHRUN, str(ranks), "-m", "benchmarks.joint_steps", folder, str(passes)]
            subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
            for name, expected in alone.items():
                each = [dict(np.load(f"{folder}/{name}-{rank}.npz")) for rank in range(ranks)]
                same = all(off(one, each[0]) == 0 for one in each)
                worst = off(each[0], expected)
                found[f"{name}, {ranks} ranks, {passes} passes"] = {"off": worst, "equal": same}
                record.say(f"{name:<20}{ranks:>6}{passes:>7}{worst:>10.1e}  {same}")


def tell_volume(record: Record) -> None:
    """Prints what a step sends, and the times that this predicts."""
    record.say(f"{'a step':<34}{'batch':>6}{'numbers':>11}{'MB':>8}  each of 8 ranks sends, MB")
    found = record.figures["volume"] = {}
    for name, spec in networks().items():
        options: TrainingOptions = RECIPES["default"](spec)
        count = sent(spec, options.batch_size)
        found[name] = 4 * count
        ring = 2 * 7 / 8 * 4 * count / 1e6
        record.say(
            f"{name:<34}{options.batch_size:>6}{count:>11}{4 * count / 1e6:>8.2f}{ring:>8.2f}"
        )
    record.say(
        "predicted for cards, each with the batch of one; choices: made by each rank's processor"
    )
    record.say(
        f"{'':<20}{'ranks':>6}{'step ms':>9}{'added ms':>10}{'efficiency':>12}{'choices ms':>12}"
    )
    record.figures["predicted"] = {}
    for name, (batch, step) in MEASURED.items():
        spec = networks()[name]
        for ranks in (8, 512):
            volume = 4 * sent(spec, batch * ranks)
            seconds = added_up(volume, ranks)
            choices = _choices_seconds(spec, batch * ranks)
            figures = {"step": step, "added up": seconds, "choices": choices}
            record.figures["predicted"][f"{name}, {ranks}"] = figures
            record.say(
                f"{name:<20}{ranks:>6}{1e3 * step:>9.2f}{1e3 * seconds:>10.3f}"
                f"{step / (step + seconds):>12.1%}{1e3 * choices:>12.2f}"
            )


def _choices_seconds(spec: ModelSpec, batch: int) -> float:
    """Returns the CPU seconds of the random choices for all images of a step.

    The step draws and revives.
    """
    rules, found = Rules(RECIPES["default"](spec), 1000), []
    for _ in range(5):
        start = time.process_time()
        rules.choices(300, spec, batch)
        found.append(time.process_time() - start)
    return min(found)


def kill(place: Path, command: list[str], ranks: int, rng: Generator) -> dict[str, Any] | None:
    """Starts a run, kills one of its ranks at a random moment, and returns how all ranks ended.

    Returns None if the run finished before.
    """
    notes = Path(tempfile.mkdtemp(dir=place))
    words = [*TORCHRUN, str(ranks), "--no-python", sys.executable, "-c", AS_RANK, str(notes)]
    with tempfile.TemporaryFile() as nowhere:
        run = subprocess.Popen(
            [*words, *command[1:]], cwd=place, env=ENVIRONMENT, stdout=nowhere, stderr=nowhere
        )
        end = time.monotonic() + WAIT
        while len([*notes.glob("*.pid")]) < ranks and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 20))
        victim = int(rng.integers(ranks))
        killed = run.poll() is None and _kill(notes / f"{victim}.pid")
        when = time.time()
        try:
            run.wait(WAIT)
        finally:
            run.kill()
    found = {int(p.stem): json.loads(p.read_text()) for p in notes.glob("*.json")}
    if not killed or found.get(victim, {}).get("code") != -signal.SIGKILL:
        return None
    others = [each for rank, each in found.items() if rank != victim]
    return {
        "seconds": max((each["when"] for each in others), default=time.time()) - when,
        "codes": [each["code"] for each in others],
        "lines": [line for each in others for line in each["said"]],
        "all ended": len(found) == ranks,
    }


def _kill(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError, ValueError):
        return False
    return True


def tell_kills(record: Record, kills: int, epochs: int, ranks: int, rng: Generator) -> bool:
    """Kills a random rank again and again; each time, the run continues.

    It must end as an undisturbed one. When a run has finished, another one begins.
    """
    codes, lines, wrong = Counter[int](), Counter[int](), []
    slowest, lost, done, runs, reached, same = 0.0, 0, 0, 1, -1, True
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place, rng)
        _finish(place, training("whole", epochs), ranks)
        while done < kills:
            name = f"killed-{runs}"
            found = kill(place, training(name, epochs), ranks, rng)
            if (place / f"{name}.pt").exists():
                same = same and equal(place / "whole.pt", place / f"{name}.pt")
                runs, reached = runs + 1, -1
            if found is None:
                continue
            done += 1
            slowest = max(slowest, found["seconds"])
            codes.update(found["codes"])
            lines[len(found["lines"])] += 1
            if not found["all ended"] or len(found["lines"]) != 1:
                wrong.append(found)
            reached, damaged = _reached(place / "runs" / name, reached)
            lost += damaged
            print(f"{done}: {found}, step {reached}", file=sys.stderr, flush=True)
        if not (place / f"{name}.pt").exists():
            _finish(place, training(name, epochs), ranks)
            same = same and equal(place / "whole.pt", place / f"{name}.pt")
    record.figures["kills"] = {
        "kills": done,
        "ranks": ranks,
        "runs": runs,
        "codes of the others": dict(codes),
        "lines of the others": dict(lines),
        "slowest end, seconds": slowest,
        "lost": lost,
        "equal": same,
        "wrong": wrong,
    }
    record.say(
        f"{done} SIGKILLs of one of {ranks} ranks: {lost} lost or damaged snapshots; "
        f"exit codes of the others {dict(codes)}; lines a kill {dict(lines)}"
    )
    record.say(
        f"the others ended within {slowest:.1f} s; final parameters "
        f"{'equal' if same else 'NOT equal'} to the undisturbed run's bit for bit"
    )
    return same and not lost and not wrong


def _finish(place: Path, command: list[str], ranks: int) -> None:
    words = [*TORCHRUN, str(ranks), *command[1:]]
    subprocess.run(words, cwd=place, env=ENVIRONMENT, check=True, capture_output=True)


def _reached(run: Path, before: int) -> tuple[int, int]:
    """Returns the step of the last snapshot, and how many were lost or damaged since ``before``."""
    states = list_states(run / SNAPSHOTS) if run.exists() else []
    if not states:
        return -1, int(before >= 0)
    now, (_, _, complaints) = int(states[0].stem.removeprefix("step-")), _sound(run)
    return now, len(complaints) + (now < before)


def _sound(run: Path) -> tuple[Any, Any, list[str]]:
    found = latest_state(run)
    if found is None:
        raise RuntimeError(f"{run} lost its snapshots")
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--kills", type=int, default=20, help="how many (default: %(default)s)")
    options.add_argument("--ranks", type=int, default=3, help="of them (default: %(default)s)")
    options.add_argument("--epochs", type=int, default=60, help="of the run that is killed")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--only-kills", action="store_true", help="nothing but kills")
    arguments = options.parse_args()
    record = Record(arguments)
    if not arguments.only_kills:
        tell_deviations(record)
        tell_volume(record)
    rng = np.random.default_rng(arguments.seed)
    right = tell_kills(record, arguments.kills, arguments.epochs, arguments.ranks, rng)
    record.write()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
