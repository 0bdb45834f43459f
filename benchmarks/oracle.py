"""``python -m benchmarks.oracle``: how long the oracle takes, how much memory it needs, and what a
check costs for networks of several sizes, beside what ``vqref.agreement.budget`` estimates.

Peak memory is what NumPy allocated during the call (tracemalloc), beside the resident size of the
process. A check is one of the trainer's, of as many images as it takes in a run.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

import vqref
from benchmarks.measure import Record, parser, timed
from vqref.agreement.budget import images_within, seconds_per_image
from vqref.families import post, residual
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Array, Params


def median_seconds(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of ``repeats`` calls by a clock, after one that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken)


def peak_of(call: Callable[[], object]) -> float:
    """MiB that one call allocates at most."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return peak


LARGE = 16_384
"""Codes of the large codebook."""

CHECKED = {
    "post 28x28": post(),
    "residual 32x32": residual(),
    "residual 64x64": residual((3, 64, 64)),
    "residual 128x128": residual((3, 128, 128)),
    "residual 128x128, 4,096": residual((3, 128, 128), num_codes=4096),
}
"""Networks by the names that the table prints."""


def measure_checks(record: Record) -> None:
    """What a check costs per image, and the rates of which its estimate is made, all in seconds of
    the processor: what else the machine does then matters little."""
    from vqtrain import VQVAE, TrainingOptions
    from vqtrain.agreement import check_against_oracle

    record.say(
        f"{'one check, processor time':<26}{'images':>7}{'seconds':>9}{'per image':>11}"
        f"{'estimated':>11}{'products/s':>12}{'differences/s':>15}"
    )
    for name, spec in CHECKED.items():
        rng = np.random.default_rng(0)
        params, count = vqref.init_params(spec, rng), images_within(spec)
        images = rng.random((count, *spec.image_shape)).astype(np.float32)
        latents, network = vqref.encode(spec, params, images), sum(r.products for r in spec.layers)
        checked = VQVAE(spec, params), images, TrainingOptions()
        seconds, passes, search = (
            median_seconds(call, 3, time.process_time)
            for call in (
                partial(check_against_oracle, *checked),
                partial(pass_through, spec, params, images, latents),
                partial(vqref.quantize, latents, params[CODEBOOK]),
            )
        )
        found = {
            "images": count,
            "seconds": seconds,
            "estimated per image": seconds_per_image(spec),
            "products per second": count * network / passes,
            "differences per second": latents.size * spec.num_codes / search,
        }
        record.figures[f"check, {name}"] = found
        record.say(
            f"{name:<26}{count:>7}{seconds:>9.2f}{seconds / count:>11.4f}"
            f"{found['estimated per image']:>11.4f}{found['products per second']:>12.2e}"
            f"{found['differences per second']:>15.2e}"
        )


def pass_through(spec: ModelSpec, params: Params, images: Array, latents: Array) -> None:
    """The oracle's networks alone."""
    vqref.encode(spec, params, images)
    vqref.decode(spec, params, latents)


def measure_forward(record: Record) -> None:
    """A batch through the post's network."""
    spec, rng = post(), np.random.default_rng(0)
    params, images = vqref.init_params(spec, rng), rng.random((64, *spec.image_shape))
    forward = partial(vqref.forward, spec, params, images)
    seconds, peak = median_seconds(forward, 7), peak_of(forward)
    record.figures["forward"] = {"seconds": seconds, "MiB": peak}
    record.say(
        f"forward, 64 images, the post's network: median {seconds:.2f} s, peak {peak:.0f} MiB"
    )


def measure_quantize(record: Record, count: int, code_size: int) -> None:
    """``count`` latents and a large codebook."""
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
    arguments = options.parse_args()
    record = Record(arguments)
    measure_forward(record)
    for code_size in (16, 64):
        measure_quantize(record, arguments.latents, code_size)
    measure_checks(record)
    record.write()


if __name__ == "__main__":
    main()
