"""The ranks of a run: what they add up, what they agree on, and how they end together.

Each rank is a process that torchrun started. All take the same steps in the same order. Gradients,
and the hits and sums for the averages, are added up, so that they are equal on all ranks. Rank 0
makes all choices and writes all files. Whatever ends one rank soon ends all, and one of them says
why:

- Signals: once per second, between two steps, all ranks agree whether one came. They then stop
  after the same step.
- Errors: a rank writes a note to torchrun's store before it ends. The others find their connections
  closed, read the note, and end with the same exit code.
- A rank that is killed or hangs leaves no note. The others find its connection closed, or its
  neighbour no longer hears its pulse.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vqref.errors import CommandError, ExitCode, MachineError
from vqref.host.interrupts import Interrupted, deafen, hold, pending
from vqref.host.streams import tell
from vqtrain import torchrun
from vqtrain.data.batches import portion
from vqtrain.device import choose_device

PATIENCE = timedelta(hours=1)
"""How long a rank waits for others with a pulse: rank 0 may be measuring, drawing or writing."""

STORE_SECONDS, START_SECONDS = 20.0, 300.0
"""The longest wait for torchrun's store to answer, and for all ranks to begin."""

BEAT, SILENCE, GRACE = 2.0, 30.0, 10.0
"""Seconds between two beats of a pulse; without a beat, until a rank counts as lost; and from one
rank's end until the others are ended, whatever they do."""

AGREED = 1.0
"""Seconds between two agreements on whether to continue. An agreement is fast, but with hundreds of
ranks it takes as long as a step."""

GOES_ON = "the same command goes on from the last snapshot"


class Ranks:
    """A run of a single rank, which waits for nobody. ``Joint`` is one rank of several.

    rank, count: the number of this rank, and how many there are.
    """

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks, draws and writes."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """Returns the range of this rank's images among ``count``: its start and its end."""
        return portion(count, self.count, self.rank)

    def together(self) -> AbstractContextManager[None]:
        """A context that all ranks enter. No signal makes a single rank leave it.

        All other joint work happens within it. Raises what ``go_on`` raises.
        """
        return nullcontext()

    def go_on(self) -> None:
        """Raises Interrupted on every rank if a signal came to any, MachineError if one is lost."""

    def another_step(self) -> None:
        """Calls ``go_on`` before a step, about once in AGREED seconds."""

    def stop(self, signum: int) -> None:
        """Tells the others, unless they know it, that this rank got a signal. All then stop."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors of one type by their sums over all ranks. All get the same bits."""

    def hand_out(self, tensors: Sequence[Tensor]) -> None:
        """Fills tensors with rank 0's values."""

    def hand_out_plain(self, value: Any) -> Any:
        """Returns rank 0's tensors and plain data."""
        return value

    def different(self, content: bytes) -> int | None:
        """Returns the first rank whose content differs from rank 0's, or None."""
        return None

    def collected(self, lines: Sequence[str]) -> list[str]:
        """Returns the lines of all ranks, rank 0's first."""
        return list(lines)

    def wait(self) -> None:
        """Waits until all ranks are here."""

    def local_first(self) -> AbstractContextManager[None]:
        """A context that each machine's first rank enters before the others, to download."""
        return nullcontext()


ALONE = Ranks()


class Joint(Ranks):
    """One rank of several. All ranks call the same methods in the same order.

    device: where tensors that are handed out are.

    Every method raises MachineError if another rank is lost.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        self._stopping = False
        self._steps, self._next, self._agreed = 0, 0, time.monotonic()

    @contextmanager
    def together(self) -> Iterator[None]:
        with hold():
            self.go_on()
            yield

    def go_on(self) -> None:
        if self._stopping:
            return
        with hold():
            signum = self._largest(pending() or 0)
            if signum:
                self._stopping = True
                raise Interrupted(signum)

    def another_step(self) -> None:
        if self._steps >= self._next:
            self.go_on()
            now = time.monotonic()
            each = round(1e6 * (now - self._agreed) / max(1, self._steps))
            slowest = self._largest(each)  # so that all agree when to agree again
            self._next = max(1, int(1e6 * AGREED / max(1, slowest)))
            self._steps, self._agreed = 0, now
        self._steps += 1

    def stop(self, signum: int) -> None:
        if not self._stopping:
            self._largest(signum)
            self._stopping = True

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        _require_all(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def hand_out(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            there = tensor.to(self.device).contiguous()
            _require_all(dist.broadcast, there, 0)
            tensor.copy_(there)

    def hand_out_plain(self, value: Any) -> Any:
        content = io.BytesIO()
        if self.first:
            torch.save(value, content)
        size = torch.tensor(content.tell())
        _require_all(dist.broadcast, size, 0)
        sent = torch.empty(int(size), dtype=torch.uint8)
        if self.first:
            sent.numpy()[:] = memoryview(content.getbuffer())
        _require_all(dist.broadcast, sent, 0)
        return torch.load(io.BytesIO(sent.numpy().tobytes()), weights_only=True)

    def different(self, content: bytes) -> int | None:
        digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
        found = self._from_all(digest)
        return next((i for i, each in enumerate(found) if not torch.equal(each, found[0])), None)

    def collected(self, lines: Sequence[str]) -> list[str]:
        content = json.dumps(list(lines)).encode()
        mine = torch.full((self._largest(len(content)),), ord(" "), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return [
            line for each in self._from_all(mine) for line in json.loads(each.numpy().tobytes())
        ]

    def wait(self) -> None:
        self._largest(0)

    @contextmanager
    def local_first(self) -> Iterator[None]:
        before = torchrun.local_rank() == 0
        if not before:
            self.wait()
        yield
        if before:
            self.wait()

    def _from_all(self, mine: Tensor) -> list[Tensor]:
        """Returns every rank's tensor, in their order. All have the same shape."""
        found = [torch.empty_like(mine) for _ in range(self.count)]
        _require_all(dist.all_gather, found, mine)
        return found

    def _largest(self, value: int) -> int:
        found = torch.tensor(value)
        _require_all(dist.all_reduce, found, dist.ReduceOp.MAX)
        return int(found)


def _require_all(collective: Callable[..., Any], *arguments: Any) -> None:
    """Calls ``collective``, as all ranks do. Raises MachineError if one is lost."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        deafen()  # torchrun now ends the others
        reason = (
            _first_line(error).split("] ", 1)[-1].split(". ")[0]
        )  # without its place in PyTorch's source, and advice
        raise MachineError(f"another rank is lost ({reason}); {GOES_ON}") from None


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """A context with the ranks of this run: those that torchrun started, or a single one.

    device: the value of ``--device``; each rank gets its own card of its machine.

    If an error ends all ranks, one reports it; the others raise SystemExit with its exit code.
    Raises MachineError if there are fewer cards than ranks, or if ranks do not find each other.
    """
    if torchrun.world() == 1:
        yield ALONE
        return
    store = _store()
    pulse = _Pulse(store, torchrun.rank(), torchrun.world())
    try:
        _assemble(store)
        pulse.start()
        ranks = _connected(store, choose_device(device))
        yield ranks
        ranks.go_on()  # no rank leaves while another works, which would miss its pulse
    except BaseException as error:
        deafen()
        code = _code_of(error)
        said = _note(store, code)
        pulse.end()
        _end_within(GRACE, code if said is None else said)
        if said is not None:
            raise SystemExit(said) from None
        raise
    else:
        pulse.end()
        dist.destroy_process_group()


def _end_within(seconds: float, code: int) -> None:
    """Ends the process after this time if it is still there; a card may hold it up."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def _store() -> Any:
    """Returns torchrun's store. Raises MachineError."""
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
        store.set_timeout(timedelta(seconds=STORE_SECONDS))
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"no connection to torchrun: {_first_line(error)}") from None
    return store


def _assemble(store: Any) -> None:
    """Waits for all ranks; a signal can interrupt it. Raises MachineError."""
    world, end = torchrun.world(), time.monotonic() + START_SECONDS
    store.add(HERE, 1)
    while (here := store.add(HERE, 0)) < world:
        if time.monotonic() > end:
            raise MachineError(f"{here} of {world} ranks began within {START_SECONDS:.0f} s")
        time.sleep(BEAT / 20)


def _connected(store: Any, device: torch.device) -> Joint:
    """Returns this rank, connected to all others."""
    rank, world, local = torchrun.rank(), torchrun.world(), torchrun.local_rank()
    card = device.type == "cuda"
    if card:
        cards = torch.cuda.device_count()
        if local >= cards:
            raise MachineError(
                f"more ranks on this machine than its {cards} cards; use fewer, or --device cpu"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if card else "gloo"
    own = PrefixStore("group", store)
    try:
        dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=PATIENCE)
    except RuntimeError as error:
        raise MachineError(f"ranks do not find each other: {_first_line(error)}") from None
    return Joint(rank, world, device)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _code_of(error: BaseException) -> int:
    """Returns the exit status of a process that this error ends."""
    if isinstance(error, Interrupted | CommandError):
        return int(error.exit_code)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else ExitCode.FAILED
    return ExitCode.ENVIRONMENT if isinstance(error, OSError | MemoryError) else ExitCode.FAILED


HERE, SAID, CODE = "here", "said", "code"
"""Keys of the store: how many ranks began; how many reported the end; the first one's exit
status."""


def _note(store: Any, code: int) -> int | None:
    """Notes that this rank ends with ``code`` and reports why.

    Returns the noted code if another rank was first, else None. Also returns None if the store does
    not answer, since there is then no reliable note.
    """
    with suppress(RuntimeError):
        if store.add(SAID, 1) > 1:
            return int(store.get(CODE))
        store.set(CODE, str(code))
    return None


class _Pulse(threading.Thread):
    """Shows the next rank that this one is alive, and watches the one before.

    It ends the process if the rank before falls silent, or if the process does not end by itself
    after another rank ended. The main thread may be waiting for a card, or for a connection that
    nothing closes.

    ``end`` stops it. The interpreter must not end while this thread uses the store.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        super().__init__(daemon=True, name="pulse")
        self.store, self.rank, self.before = store.clone(), rank, (rank - 1) % count
        self._ended = threading.Event()
        self._ending = False
        self._heard, self._since = b"", math.inf

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        self._since = time.monotonic()
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            with suppress(RuntimeError):
                self.store.set(f"pulse/{self.rank}", str(beat))
                self._listen()
            if time.monotonic() - self._since > SILENCE:
                self._lost()

    def _listen(self) -> None:
        """Notes the pulse of the rank before, and whether another rank has ended."""
        place = f"pulse/{self.before}"
        if self.store.check([place]) and (found := self.store.get(place)) != self._heard:
            self._heard, self._since = found, time.monotonic()
        if not self._ending and self.store.check([CODE]):
            self._ending = True
            _end_within(GRACE, int(self.store.get(CODE)))

    def _lost(self) -> None:
        code = _note(self.store, ExitCode.ENVIRONMENT)
        if code is None:
            code = ExitCode.ENVIRONMENT
            tell("vqtrain", f"rank {self.before} no longer answers; {GOES_ON}")
        os._exit(code)


def digest_of(arrays: Mapping[str, Any]) -> bytes:
    """Returns a digest of all bits of NumPy arrays by name."""
    found = hashlib.sha256()
    for name, array in arrays.items():
        found.update(name.encode() + array.tobytes())
    return found.digest()
