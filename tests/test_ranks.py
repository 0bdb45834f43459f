"""Several ranks do what one does: the same steps, the same snapshots, and one end for all.

They are real processes. They find each other by the environment that torchrun would give them, or
are started by torchrun itself.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import CPU, ROOT

import vqtrain.nearest
from benchmarks.joint_steps import EVERY_RULE, SPECS, fifty_steps, fifty_steps_of_each, off
from vqtrain import VQVAE
from vqtrain.data.batches import Batches, portion
from vqtrain.modelfile import read_model
from vqtrain.quantizer import draw
from vqtrain.run import rules
from vqtrain.run.folder import latest_state
from vqtrain.run.ranks import Ranks
from vqtrain.run.snapshot import list_states
from vqtrain.run.step import Split, make_optimizer, training_step

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
RUN = (
    *("--data", "data.npz", "--held-out", "0", "--epochs", "2", "--batch-size", "22"),
    *("--base-depth", "2", "--num-codes", "8", "--latent-size", "2", "--code-size", "4"),
    *("--plain-steps", "1", "--temperature", "0.3", "--revive-below", "0.5", "--snapshot-steps"),
    *("2", "--precision", "float32", "--device", "cpu", "--check-images", "4", "--name", "r"),
)
"""Ten steps, with batches that four ranks cannot split evenly."""


@pytest.fixture
def place(tmp_path, many_images):
    np.savez(tmp_path / "data.npz", many_images[:128])
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


class Started:
    """Ranks as torchrun starts them, with a store like its own; the test has each process.

    If one ends, nobody ends the others, as torchrun would: they must find out themselves.
    """

    def __init__(self, place, count, *words, run=("-m", "vqtrain", *RUN)):
        self.store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        shared = environment(
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.store.port),
            TORCHELASTIC_RUN_ID="test",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        self.processes = [
            subprocess.Popen(
                [sys.executable, *run, *words],
                cwd=place,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]

    def send(self, rank, signum):
        self.processes[rank].send_signal(signum)

    def ended(self, seconds=120):
        """Returns exit statuses, and what was printed on stdout and on stderr, by rank."""
        said = [process.communicate(timeout=seconds) for process in self.processes]
        out, errors = zip(*said, strict=True)
        return [process.returncode for process in self.processes], out, errors


def go(place, *more, how=(sys.executable,)):
    """Runs one rank without torchrun, or what ``how`` starts."""
    return subprocess.run(
        [*how, "-m", "vqtrain", *RUN, *more],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def parameters(path):
    return read_model(path).params


def wait_for_snapshot(place, started, step=2):
    end = time.monotonic() + 120
    while not [p for p in list_states(place / "runs/r/snapshots") if int(p.stem[5:]) >= step]:
        assert time.monotonic() < end
        if any(process.poll() is not None for process in started.processes):
            pytest.fail(f"ended before a snapshot: {started.ended()}")
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone():
    """The result of fifty steps of one rank in one pass, by name."""
    return fifty_steps_of_each()


@pytest.mark.parametrize(("ranks", "passes"), [(2, 1), (4, 1), (2, 2)])
def test_fifty_steps_of_any_number_of_ranks_are_those_of_one(tmp_path, alone, ranks, passes):
    words = [*TORCHRUN, str(ranks), "-m", "benchmarks.joint_steps", str(tmp_path), str(passes)]
    subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, check=True)
    for name, expected in alone.items():
        each = [dict(np.load(tmp_path / f"{name}-{rank}.npz")) for rank in range(ranks)]
        own = [found.pop("losses") for found in each]
        losses = np.mean(own[:3], axis=0)  # a fourth rank has no image
        for found in each[1:]:
            assert all(np.array_equal(found[key], each[0][key]) for key in found)
        assert off(each[0], expected) <= 1e-10
        if name != "post":  # a batch of three images: each rank has equally many, or none
            np.testing.assert_allclose(losses[-1], expected["losses"][-1], rtol=0.05)


def test_passes_of_one_rank_are_one_step(alone):
    for name, each in SPECS.items():
        found = fifty_steps(*each, passes=3)
        assert off(found, alone[name]) <= 1e-10


def test_the_compared_steps_draw_reset_and_start_codes():
    """Without any one of these rules, steps end elsewhere; so a rank that broke it would show."""
    spec, options = SPECS["residual"]
    generator = rules.Rules(options, 50).generator.get_state()
    for change in ({"temperature": 0.0}, {"revive_below": 0.0}, {"kmeans_start": False}):
        changed = fifty_steps(spec, type(options)(**{**options.to_dict(), **change}))
        assert off(changed, fifty_steps(spec, options)) > 1e-3, change
    assert torch.equal(generator, rules.Rules(options, 50).generator.get_state())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many_images):
    """The result of one rank that was not disturbed."""
    place = tmp_path_factory.mktemp("whole")
    np.savez(place / "data.npz", many_images[:128])
    assert go(place).returncode == 0
    return read_model(place / "model.pt")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_command_under_torchrun_trains_what_it_trains_without(place, whole, ranks):
    done = go(place, "--name", "n", "--output", "n.pt", how=(*TORCHRUN, str(ranks)))
    assert done.returncode == 0, done.stderr
    found = read_model(place / "n.pt")
    assert off(found.params, whole.params) <= 1e-4
    assert all(line["oracle"]["passed"] for line in found.metrics["history"])
    assert found.provenance["ranks"] == ranks
    (first, *_), lines = done.stdout.splitlines(), done.stdout.splitlines()
    assert f"10 steps of 22 on cpu, {ranks} ranks" in done.stdout
    assert lines.count(first) == 1  # only rank 0 prints
    assert done.stdout.count("oracle: agrees") == 2
    one, many = whole.metrics, found.metrics
    for measure in ("bound", "commitment", "perplexity", "codes_used"):
        assert many[measure] == pytest.approx(one[measure], rel=1e-4)
        assert many["training_sample"][measure] == pytest.approx(
            one["training_sample"][measure], rel=1e-4
        )
    assert many["training_sample"]["ssim"] == pytest.approx(
        one["training_sample"]["ssim"], rel=1e-3
    )


FAILS = """
import sys
from vqtrain import torchrun
from vqtrain.__main__ import main
import vqtrain.run.trainer as trainer
{change}
sys.exit(main(sys.argv[1:]))
"""
STOPS = """
import os, signal
taken = trainer.training_step
def stopping(model, optimizer, images, options, rules, step, split):
    if step == 2 and torchrun.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    split.ranks._next = 0  # agree before each step
    return taken(model, optimizer, images, options, rules, step, split)
trainer.training_step = stopping
"""
"""Sends a signal to rank 1 in its third step."""


@pytest.mark.parametrize("signalled", [[1], [0, 1]])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(place, signalled):
    started = Started(place, 2)
    wait_for_snapshot(place, started)
    for rank in signalled:
        started.send(rank, signal.SIGTERM)
    codes, _, errors = started.ended()
    assert codes == [143, 143], errors
    (line,) = "".join(errors).splitlines()
    found = re.search(r"interrupted in epoch (\d), step (\d), and saved; the same command", line)
    state, _, complaints = latest_state(place / "runs/r")
    assert (state["epoch"], state["step"]) == (int(found[1]) - 1, int(found[2]))
    assert state["meter"]["count"] == 22 * state["step"]
    assert not complaints


def test_what_two_ranks_saved_one_and_four_go_on_with(place, whole):
    run = ("-c", FAILS.format(change=STOPS), *RUN)
    codes, _, errors = Started(place, 2, run=run).ended()
    assert codes == [143, 143], errors
    _, path, _ = latest_state(place / "runs/r")
    assert path.name == "step-00000003.state"
    for ranks in (1, 4):
        folder = place / f"on-{ranks}"
        (folder / "snapshots").mkdir(parents=True)
        (folder / "snapshots" / path.name).write_bytes(path.read_bytes())
        how = ["--resume", str(folder), "--output", f"{ranks}.pt"]
        if ranks == 1:
            assert go(place, *how).returncode == 0
        else:
            codes, _, errors = Started(place, ranks, *how).ended()
            assert codes == [0] * ranks, errors
        assert off(parameters(place / f"{ranks}.pt"), whole.params) <= 1e-4


@pytest.mark.parametrize(("ranks", "killed"), [(2, 0), (3, 1)])
def test_a_killed_rank_ends_the_others_with_one_line_and_the_last_snapshot_whole(
    place, ranks, killed
):
    started = Started(place, ranks, "--epochs", "40")
    wait_for_snapshot(place, started)
    started.send(killed, signal.SIGKILL)
    began = time.monotonic()
    codes, _, errors = started.ended()
    assert time.monotonic() - began < 60
    assert codes.pop(killed) == -9
    assert codes == [5] * (ranks - 1), errors
    (line,) = "".join(errors).splitlines()
    assert line.startswith("vqtrain: another rank is lost (")
    assert line.endswith("; the same command goes on from the last snapshot")
    _, _, complaints = latest_state(place / "runs/r")
    assert not complaints


def test_a_rank_that_stands_still_is_not_waited_for(place):
    started = Started(place, 2, "--epochs", "40")
    wait_for_snapshot(place, started)
    started.send(1, signal.SIGSTOP)
    try:
        began = time.monotonic()
        _, errors = started.processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 60
    finally:
        started.send(1, signal.SIGKILL)
        started.ended()
    assert started.processes[0].returncode == 5
    says = "vqtrain: rank 1 no longer answers; the same command goes on from the last snapshot\n"
    assert errors == says


CHANGES = {
    "a rank computes something else": (
        "if torchrun.rank() == 1:\n"
        "    taken = trainer.training_step\n"
        "    def wrong(model, *rest):\n"
        "        found = taken(model, *rest)\n"
        "        model.quantizer.codebook[0, 0] += 1e-6\n"
        "        return found\n"
        "    trainer.training_step = wrong",
        (4, "vqtrain: rank 1 disagrees with rank 0 in epoch 1; nothing was written\n"),
    ),
    "the oracle disagrees": (
        "from vqtrain.network import ACTIVATIONS\nimport torch\nACTIVATIONS['elu'] = torch.relu",
        (4, "vqtrain: the model disagrees with the oracle before the first step: "),
    ),
    "rank 0 cannot write": (
        "def full(*_):\n    raise OSError(28, 'No space left on device', 'runs')\n"
        "trainer.save_state = full",
        (5, "vqtrain: runs: No space left on device\n"),
    ),
    "the loss of one rank is not finite": (
        "import torch\n"
        "if torchrun.rank() == 1:\n"
        "    nats = trainer.Meter.add\n"
        "    trainer.Meter.add = lambda self, losses, indices: nats(\n"
        "        self, losses._replace(total=losses.total * torch.nan), indices)",
        (1, "vqtrain: the loss is nan in epoch 1; nothing was written\n"),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_ends_one_rank_ends_all_with_one_line_and_one_exit_code(place, what):
    change, (code, line) = CHANGES[what]
    run = ("-c", FAILS.format(change=change), *RUN)
    codes, _, errors = Started(place, 2, "--snapshot-steps", "9", run=run).ended()
    assert codes == [code, code], errors
    assert len("".join(errors).splitlines()) == 1
    assert "".join(errors).startswith(line)


def test_other_images_on_one_rank_are_refused(place, many_images):
    np.savez(place / "other.npz", many_images[100:228])
    run = ("-c", "import os, sys\nfrom vqtrain.__main__ import main\n"
           "sys.exit(main([*sys.argv[1:], '--data', ['data.npz', 'other.npz']"
           "[int(os.environ['RANK'])]]))", *RUN)  # fmt: skip
    codes, _, errors = Started(place, 2, run=run).ended()
    assert codes == [3, 3]
    assert "".join(errors) == "vqtrain: rank 1 has other images or options than rank 0\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--epoch", "3"], 2, "vqtrain: unknown option --epoch; did you mean --epochs?"),
        (["--config", "none.toml"], 3, "vqtrain: none.toml: No such file or directory"),
        (["--data", "none.npz"], 3, "vqtrain: none.npz: No such file or directory"),
        (["--device", "cuda"], 5, "vqtrain: --device cuda: PyTorch finds no CUDA device here"),
    ],
)
def test_what_all_ranks_would_refuse_is_said_once(place, words, code, says):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    codes, _, errors = Started(place, 2, *words).ended()
    assert codes == [code, code]
    assert len("".join(errors).splitlines()) == 1
    assert "".join(errors).startswith(says)


@pytest.mark.parametrize("command", ["prior", "evaluate"])
def test_a_command_that_makes_no_use_of_ranks_is_refused_in_one_line(place, command):
    codes, _, errors = Started(place, 2, run=("-m", "vqtrain", command, "model.pt")).ended()
    assert codes == [2, 2]
    says = f"vqtrain: {command} works in one process; start it without torchrun\n"
    assert "".join(errors) == says


@pytest.mark.parametrize("count", [0, 1, 3, 22, 64])
@pytest.mark.parametrize("parts", [1, 2, 4, 7])
def test_portions_are_all_in_order_and_as_alike_as_can_be(count, parts):
    found = [portion(count, parts, part) for part in range(parts)]
    assert [i for first, last in found for i in range(first, last)] == [*range(count)]
    sizes = [last - first for first, last in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_the_parts_of_ranks_make_up_each_batch():
    images = np.arange(23, dtype=np.uint8).reshape(23, 1, 1, 1)

    def epoch(part=None):
        return [*Batches(images, 5, CPU, part).shuffled(torch.Generator().manual_seed(1))]

    parts = [epoch(portion(5, 3, rank)) for rank in range(3)]
    for whole, *slices in zip(epoch(), *parts, strict=True):
        assert torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_from_a_seed_does_not_depend_on_how_a_batch_is_split(monkeypatch, dtype):
    """Noise is for four latents at a time; parts begin and end within these."""
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.normal(size=(9, 3, 2))).to(dtype)
    codebook = torch.from_numpy(rng.normal(size=(6, 2))).to(dtype)
    monkeypatch.setattr(vqtrain.nearest, "PROCESSOR_BYTES", 4 * 12 * latents.element_size())
    variance = torch.tensor(0.5, dtype=dtype)
    whole = draw(latents, codebook, 7, 0.9, variance)
    for cuts in ([0, 9], [0, 1, 9], [0, 2, 5, 7, 9], [*range(10)]):
        parts = [
            draw(latents[a:b], codebook, 7, 0.9, variance, (3 * a, 27))
            for a, b in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(draw(latents[3:], codebook, 7, 0.9, variance), whole[3:])


def test_accumulated_passes_in_bfloat16_keep_their_gradients_in_float32(model, real_images):
    options = type(EVERY_RULE)(batch_size=16, precision="bfloat16")
    gradients = []
    for passes in (1, 4):
        module = VQVAE(model.spec, model.params)
        optimizer, each = make_optimizer(module, options), rules.Rules(options, 10)
        images = torch.from_numpy(real_images)
        training_step(module, optimizer, images, options, each, 0, Split(passes=passes))
        gradients.append([p.grad for p in module.decoder.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts, whole, rtol=0, atol=0.02 * float(whole.abs().max()))


def test_accumulate_is_an_option_that_a_folder_keeps(place, whole):
    assert go(place, "--accumulate", "3").returncode == 0
    found = read_model(place / "model.pt")
    assert off(found.params, whole.params) <= 1e-4
    assert "accumulate = 3" in (place / "runs/r/options.toml").read_text()
    assert "accumulate" not in found.training


def test_one_rank_alone_has_nobody_to_wait_for():
    ranks, tensor = Ranks(), torch.ones(2)
    with ranks.together(), ranks.local_first():
        ranks.go_on()
        ranks.wait()
        ranks.add_up([tensor])
        ranks.hand_out([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert ranks.different(b"") is None
    assert ranks.part(7) == (0, 7)
