"""How far long work is: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

from torch import Tensor
from tqdm import tqdm

from vqtrain.options import TrainingOptions
from vqtrain.run.snapshot import RunState

SECONDS, BAR_SECONDS = 30.0, 0.5
"""Between two lines, and before the first; between two looks at the losses for a bar."""

Say = Callable[[str], None]


class Due:
    """Tells whether it is time for a line: ``seconds`` after it was made, and after each line."""

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
    """How long each of several equal things takes, counted from where ``done`` of them are done."""

    def __init__(self, done: int) -> None:
        self.done, self.since = done, time.monotonic()

    def seconds(self, done: int) -> float:
        """Seconds for each, now that ``done`` are done, at least one more than at first."""
        return (time.monotonic() - self.since) / (done - self.done)


class Progress:
    """Shows how far an epoch of a run is.

    state: of the run. steps_each: in an epoch. say: takes the lines. bar: whether a terminal shows
    a bar instead.
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
        """Takes the pace from here on: something else than a step took long."""
        self.pace = Pace(self.state.step)

    def steps(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """The batches of the rest of an epoch, each taken before the next is asked for.

        To read the losses is to wait for the device: they are read as often as somebody sees them.
        """
        self.restart()
        yield from self._behind_a_bar(batches) if self.bar else self._with_lines(batches)
        self.stepped = time.monotonic()

    def ended(self) -> None:
        """Notes that the epoch whose steps are taken is measured and published, too."""
        self.ending = time.monotonic() - self.stepped

    def _with_lines(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        due = Due(SECONDS)
        for images in batches:
            yield images
            if due():
                self._tell()

    def _tell(self) -> None:
        """Says how far the epoch is, and how long the run takes at its pace."""
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
        """``counting`` for the images that are measured after an epoch."""
        return counting(self.say, self._epoch(), total)

    def _epoch(self) -> str:
        return f"epoch {self.state.epoch + 1}/{self.options.epochs}"


def counting(say: Say, what: str, total: int) -> Callable[[int], None]:
    """Takes how many of ``total`` images are measured, and says it every SECONDS.

    what: begins the line, as "epoch 3/20".
    """
    due, pace = Due(SECONDS), Pace(0)

    def measured(count: int) -> None:
        if due():
            left = duration(pace.seconds(count) * (total - count))
            say(f"{what}: {count} of {total} images measured, about {left} left")

    return measured


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _ignore(line: str) -> None:
    """Says nothing."""
