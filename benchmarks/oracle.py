"""``python -m benchmarks.oracle``: measures time and memory of the oracle, and what a check costs.

Checks are measured for networks of several sizes, and compared with the estimate of
``vqref.agreement.budget``.

Peak memory is what NumPy allocated during the call (tracemalloc); the resident size of the process
is given too. A check is the trainer's, on as many images as in a run. Its cost per image is what
each further image adds; its fixed cost is that of no images.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

import vqref
from benchmarks.measure import ROOT, Record, parser, timed
from vqref.agreement.budget import images_within, seconds_per_image
from vqref.families import post, residual
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params


def median_seconds(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Returns the median seconds of ``repeats`` calls by a clock, after one that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken)


def peak_of(call: Callable[[], object]) -> float:
    """Returns the most MiB that one call allocates."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


LARGE = 16_384
"""The number of codes of the large codebook."""

CHECKED = {
    "post 28x28": post(),
    "residual 32x32": residual(),
    "residual 64x64": residual((3, 64, 64)),
    "residual 128x128": residual((3, 128, 128)),
    "residual 128x128, 4096": residual((3, 128, 128), num_codes=4096),
}
"""Networks, by the names that the table prints."""


def measure_check(name: str) -> dict[str, float]:
    """Returns the CPU seconds of a check of one network, and the rates behind its estimate.

    CPU seconds do not depend on what else the machine does.
    """
    from vqtrain import VQVAE, TrainingOptions
    from vqtrain.agreement import check_against_oracle

    spec, rng = CHECKED[name], np.random.default_rng(0)
    params, most = vqref.init_params(spec, rng), images_within(spec)
    images = rng.random((most, *spec.image_shape)).astype(np.float32)
    latents = vqref.encode(spec, params, images)
    model, options = VQVAE(spec, params), TrainingOptions()

    def taken(call: Callable[[], object]) -> float:
        return median_seconds(call, 3, time.process_time)

    few = most // 4
    whole, part = (
        taken(partial(check_against_oracle, model, images[:count], options))
        for count in (most, few)
    )
    each = (whole - part) / (most - few)
    passes = taken(partial(pass_through, spec, params, images, latents))
    search = taken(partial(vqref.quantize, latents, params[CODEBOOK]))
    return {
        "images": most,
        "seconds": whole,
        "per image": each,
        "estimated": seconds_per_image(spec),
        "fixed": part - few * each,
        "products per second": most * sum(row.products for row in spec.layers) / passes,
        "differences per second": latents.size * spec.num_codes / search,
    }


def measure_checks(record: Record) -> None:
    """Returns the costs of checks, each measured in a process with one thread.

    With more, threads that wait for each other would take CPU time, too.
    """
    record.say(
        f"{'one check, one thread':<25}{'images':>7}{'seconds':>9}{'fixed':>7}{'per image':>11}"
        f"{'estimated':>11}{'products/s':>12}{'differences/s':>15}"
    )
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in CHECKED:
        command = [sys.executable, "-m", "benchmarks.oracle", "--check", name]
        run = subprocess.run(
            command, cwd=ROOT, env=alone, check=True, stdout=subprocess.PIPE, text=True
        )
        found = json.loads(run.stdout)
        record.figures[f"check, {name}"] = found
        record.say(
            f"{name:<25}{found['images']:>7}{found['seconds']:>9.2f}{found['fixed']:>7.2f}"
            f"{found['per image']:>11.4f}{found['estimated']:>11.4f}"
            f"{found['products per second']:>12.1e}{found['differences per second']:>15.1e}"
        )


def pass_through(spec: ModelSpec, params: Params, images: Array, latents: Array) -> None:
    """Runs only the oracle's networks."""
    vqref.encode(spec, params, images)
    vqref.decode(spec, params, latents)


def measure_forward(record: Record) -> None:
    """Measures a batch through the post's network."""
    spec, rng = post(), np.random.default_rng(0)
    params, images = vqref.init_params(spec, rng), rng.random((64, *spec.image_shape))
    forward = partial(vqref.forward, spec, params, images)
    seconds, peak = median_seconds(forward, 7), peak_of(forward)
    record.figures["forward"] = {"seconds": seconds, "MiB": peak}
    record.say(
        f"forward, 64 images, the post's network: median {seconds:.2f} s, peak {peak:.0f} MiB"
    )


def measure_quantize(record: Record, count: int, code_size: int) -> None:
    """Measures ``count`` latents and a large codebook."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(count, 1, code_size))
    codebook = rng.normal(size=(LARGE, code_size))
    quantize = partial(vqref.quantize, codebook=codebook)
    seconds = timed(partial(quantize, latents))
    tenth = peak_of(partial(quantize, latents[: count // 10]))
    peak = peak_of(partial(quantize, latents))
    answer = count * (2 + code_size) * 8 / 2**20
    found = {"seconds": seconds, "MiB": peak, "answer": answer, "MiB of a tenth": tenth}
    record.figures[f"quantize, {code_size}"] = found
    record.say(
        f"quantize, {count} latents x {LARGE} codes of {code_size}: {seconds:.0f} s, "
        f"peak {peak:.0f} MiB, of which {answer:.0f} the answer "
        f"(a tenth of the latents: {tenth:.0f} MiB)"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--latents",
        type=int,
        default=100_000,
        help="latents for the large quantize (default: %(default)s)",
    )
    options.add_argument("--check", choices=tuple(CHECKED), help="one check, as JSON")
    arguments = options.parse_args()
    if arguments.check:
        print(json.dumps(measure_check(arguments.check)))
        return
    record = Record(arguments)
    measure_forward(record)
    for code_size in (16, 64):
        measure_quantize(record, arguments.latents, code_size)
    measure_checks(record)
    record.write()


if __name__ == "__main__":
    main()
