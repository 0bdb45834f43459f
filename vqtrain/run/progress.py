"""Shows the progress of long work: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from torch import Tensor
from tqdm import tqdm

from vqtrain.options import TrainingOptions
from vqtrain.run.snapshot import RunState

SECONDS, BAR_SECONDS = 30.0, 0.5
"""Seconds between two lines, and before the first; between two readings of losses for a bar."""

Say = Callable[[str], None]


class Due:
    """Tells when it is time for a line: ``seconds`` after the start, and after each line."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next = time.monotonic() + seconds

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + self.seconds
        return True


class Pace:
    """Measures how long one of several equal things takes, starting when ``done`` are done."""

    def __init__(self, done: int) -> None:
        self.done, self.since = done, time.monotonic()

    def seconds(self, done: int) -> float:
        """Returns the seconds per thing once ``done``, more than at the start, are done."""
        return (time.monotonic() - self.since) / (done - self.done)


class Progress:
    """Shows the progress of an epoch.

    state: of the run. steps_each: steps per epoch. say: takes the lines. bar: whether to show a bar
    on a terminal instead.
    """

    def __init__(
        self, state: RunState, options: TrainingOptions, steps_each: int, say: Say, *, bar: bool
    ) -> None:
        self.state, self.options, self.steps_each = state, options, steps_each
        self.bar = bar and sys.stderr is not None and sys.stderr.isatty()
        self.say = _ignore if self.bar else say
        self.ending = 0.0  # seconds from the last step of an epoch to its end
        self.restart()

    def restart(self) -> None:
        """Measures the pace from now on, so that long work before does not count."""
        self.pace = Pace(self.state.step)

    def steps(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yields the batches of the rest of an epoch; each is used before the next is taken.

        Reading the losses waits for the device, so they are read only when they are shown.
        """
        self.restart()
        yield from self._behind_a_bar(batches) if self.bar else self._with_lines(batches)
        self.stepped = time.monotonic()

    def ended(self) -> None:
        """Notes that the epoch is measured and published."""
        self.ending = time.monotonic() - self.stepped

    def _with_lines(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        due = Due(SECONDS)
        for images in batches:
            yield images
            if due():
                self._tell()

    def _tell(self) -> None:
        """Reports the progress of the epoch, and how long the rest of the run takes at its pace."""
        state, bound = self.state, self.state.meter.read().bound
        each = self.pace.seconds(state.step)
        epochs = self.options.epochs - state.epoch
        left = each * (epochs * self.steps_each - state.step) + epochs * self.ending
        rate = self.options.batch_size / each
        self.say(
            f"{self._epoch()}: step {state.step} of {self.steps_each}, bound {bound:.1f}, "
            f"{rate:.{0 if rate >= 10 else 2}f} images/s, about {duration(left)} left"
        )

    def _behind_a_bar(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        bar = tqdm(
            batches,
            desc=self._epoch(),
            initial=self.state.step,
            total=self.steps_each,
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )
        due = Due(BAR_SECONDS)
        for images in bar:
            yield images
            if due():
                now = self.state.meter.read()
                bar.set_postfix_str(
                    f"bound {now.bound:.1f}, commitment {now.commitment:.3f}", refresh=False
                )

    def measuring(self, total: int) -> Callable[[int], None]:
        """Returns ``counting`` for the images measured after an epoch."""
        return counting(self.say, self._epoch(), total)

    def _epoch(self) -> str:
        return f"epoch {self.state.epoch + 1}/{self.options.epochs}"


def counting(say: Say, what: str, total: int) -> Callable[[int], None]:
    """Returns a function that takes how many of ``total`` images are done, and reports regularly.

    what: begins the line, for example "epoch 3/20".
    """
    due, pace = Due(SECONDS), Pace(0)

    def measured(count: int) -> None:
        if due():
            left = duration(pace.seconds(count) * (total - count))
            say(f"{what}: {count} of {total} images measured, about {left} left")

    return measured


def duration(seconds: float) -> str:
    """Formats seconds in a convenient unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _ignore(line: str) -> None:
    """Says nothing."""
