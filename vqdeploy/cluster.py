"""Computes tokens on many cores and machines, with Ray Data.

``on_ray`` is an engine for ``vqdeploy.archives``. ``CodecActor`` is for users who already have a
pipeline of Ray Data:

    dataset = ray.data.read_parquet("images").map_batches(
        CodecActor, fn_constructor_args=["model-onnx"], batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=4), num_cpus=1)

Ray is imported only when it is used, so that workers can import this module without it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqdeploy.archives import Job, Outcome, Part, PartEncoder
from vqdeploy.codec import Codec
from vqref.errors import CommandError, InputError, MachineError
from vqref.host.archives import Record, to_image
from vqref.host.interrupts import SIGNALS, Interrupted
from vqref.host.pictures import Reading
from vqref.validation import Array

WORKERS_PER_CARD = 4
"""Workers that share a GPU: one decodes pictures while the graph of another runs."""

QUEUED = 2
"""Parts that a worker holds at a time, including the one it works on."""

SECONDS_TO_CONNECT = 10
"""The longest that connecting to a cluster may take."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # we get errors as exceptions, and print one line
    "RAY_worker_niceness": "0",  # the user waits for this job
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the job decides who has no GPU, not a variable
}
"""Settings for Ray, unless the user's environment sets them."""


class CodecActor:
    """A Codec for ``map_batches``. It adds a column ``indices``, int64 (N, S), to each batch.

    bundle: the folder that export wrote. Every machine must have it.
    column: the column of the images. They are bytes of pictures, {bytes, path}, or arrays, uint8 or
    floating in [0, 1].
    device, threads: as for ``Codec.load``. One thread fits ``num_cpus=1``.
    manifest_sha256: the digest that the bundle must have.

    Raises what ``Codec.load`` raises, and InputError if a batch has an unreadable image.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        column: str = "image",
        device: str = "auto",
        threads: int | None = 1,
        manifest_sha256: str | None = None,
    ) -> None:
        self.column = column
        self.codec = Codec.load(
            bundle, device, intra_op_num_threads=threads, manifest_sha256=manifest_sha256
        )
        self.reading = Reading.of(self.codec.preprocessing, self.codec.spec.image_shape)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        return {**batch, "indices": self.codec.encode(self._images(batch[self.column]))}

    def _images(self, rows: Array) -> Array:
        """Returns images (N, C, H, W). Raises InputError."""
        shape = self.codec.spec.image_shape
        if rows.dtype != object:
            return rows
        contents = [row["bytes"] if isinstance(row, dict) else row for row in rows]
        records = [
            Record(str(i), content, "the row holds no image") for i, content in enumerate(contents)
        ]
        images = []
        for record in records:
            try:
                images.append(to_image(record, shape, self.reading))
            except InputError as error:
                raise InputError(f"row {record.key} of the batch: {error}") from None
        return np.stack(images) if images else np.empty((0, *shape), np.uint8)


class PartActor:
    """A ``PartEncoder`` for ``map_batches``.

    It takes rows of a pickled ``part`` and returns rows of a pickled ``outcome``. If there was a
    CommandError, that error is the outcome.
    """

    def __init__(self, job: Job) -> None:
        self.encode: PartEncoder | CommandError
        try:
            self.encode = PartEncoder(job)
        except CommandError as error:
            self.encode = error

    def __call__(self, batch: dict[str, Array]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._outcome(part)) for part in batch["part"]]}

    def _outcome(self, part: bytes) -> Outcome | CommandError:
        if isinstance(self.encode, CommandError):
            return self.encode
        try:
            return self.encode(pickle.loads(part))
        except CommandError as error:
            return error
        except OSError as error:
            return MachineError(f"{error.filename or self.encode.job.output}: {error.strerror}")


def on_ray(
    job: Job, parts: Sequence[Part], *, address: str | None = None, workers: int | None = None
) -> Iterator[Outcome]:
    """The engine of many workers. Each worker is an actor with one Codec.

    address: the address of a cluster. Its machines must see bundle, source and output under the
    same paths. None starts a cluster on this machine until the job ends.
    workers: how many work at a time. None takes WORKERS_PER_CARD per GPU if there are GPUs and the
    job's device is not "cpu". Otherwise it takes as many workers as the cores allow, with
    ``job.threads`` cores each (1 if that is None).

    Raises MachineError if Ray is not installed, the cluster cannot be reached, or a worker dies.
    Also raises what a PartEncoder raises.
    """
    import ray.data

    with _cluster(address):
        pool = _pool(job, ray.cluster_resources(), workers)
        own = dataclasses.replace(job, device=pool.device, threads=pool.cores)
        dataset = ray.data.from_items(
            [{"part": pickle.dumps(part)} for part in parts],
            override_num_blocks=max(1, len(parts)),
        ).map_batches(
            PartActor,
            fn_constructor_args=[own],
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(pool.size, max(1, len(parts))), max_tasks_in_flight_per_actor=QUEUED
            ),
            num_cpus=pool.cores,
            num_gpus=pool.cards,
        )
        try:
            for row in dataset.iter_rows():
                outcome = pickle.loads(row["outcome"])
                if isinstance(outcome, CommandError):
                    raise outcome
                yield outcome
        except ray.exceptions.RayError as error:
            raise MachineError(f"Ray: {str(error).strip().splitlines()[-1]}") from None


class _Pool(NamedTuple):
    """The number of actors, and what each of them takes.

    cores: cores and threads. cards: a share of a GPU. device: the device of the Codec.
    """

    size: int
    cores: int
    cards: float
    device: str


def _pool(job: Job, resources: Mapping[str, float], workers: int | None) -> _Pool:
    """Chooses the actors for a job.

    Raises MachineError if the cluster lacks the device or cannot run so many workers.
    """
    cores, cards = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    threads = job.threads or 1
    if job.device == "cuda" and not cards:
        raise MachineError("device cuda: no machine of the cluster has a GPU")
    if job.device == "cpu":
        cards = 0
    most = cores // threads
    size = workers or (max(1, min(most, WORKERS_PER_CARD * cards)) if cards else max(1, most))
    if size > most:
        raise MachineError(
            f"{size} workers of {threads} cores each need more than the {cores} cores there are"
        )
    share = 1 / -(-size // cards) if cards else 0
    return _Pool(size, threads, share, "cuda" if cards else "cpu")


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster or starts one, and prints nothing. Raises MachineError."""
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    import ray
    import ray.data

    if address is not None:
        _require_open(address)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        try:
            with _silence():
                ray.init(
                    address=address or "local",
                    runtime_env=_same_modules() if address is None else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    include_dashboard=False,
                )
        except SystemExit:  # Ray raises it for a signal while it starts
            raise Interrupted(signal.SIGTERM) from None
        except Exception as error:
            raise MachineError(f"Ray: {error}") from None
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
    finally:
        ray.shutdown()


def _require_open(address: str) -> None:
    """Raises MachineError unless something listens at HOST:PORT. Accepts other forms of addresses.

    Ray itself would try for minutes.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise MachineError(f"Ray: no cluster at {address}: {error}") from None


def _same_modules() -> dict[str, dict[str, str]]:
    """Returns a ``runtime_env`` in which workers import what this process imports."""
    return {
        "env_vars": {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Discards what Ray's C++ code prints on stderr about its own log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
