"""``python -m benchmarks.oracle``: how long the oracle takes and how much memory it needs.

Peak memory is what NumPy allocated during the call (tracemalloc), beside the resident size of the process.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

import vqref
from benchmarks.measure import Record, parser


def measure(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of ``repeats`` calls after one that is not counted, and peak MiB of one more."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return statistics.median(seconds), peak


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--latents", type=int, default=100_000, help="latents for the large quantize (default: %(default)s)")
    arguments = options.parse_args()
    rng = np.random.default_rng(0)
    record = Record(arguments)

    spec = vqref.ModelSpec()
    params, images = vqref.init_params(spec, rng), rng.random((64, *spec.image_shape))
    seconds, peak = measure(lambda: vqref.forward(spec, params, images), 7)
    record.figures["forward"] = {"seconds": seconds, "MiB": peak}
    record.say(f"forward, 64 images, the post's network: median {seconds:.2f} s, peak {peak:.0f} MiB")

    for code_size in (16, 64):
        latents, codebook = rng.normal(size=(arguments.latents, 1, code_size)), rng.normal(size=(16_384, code_size))
        start = time.perf_counter()
        vqref.quantize(latents, codebook)
        seconds = time.perf_counter() - start
        tracemalloc.start()
        vqref.quantize(latents[: arguments.latents // 10], codebook)
        tenth = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.reset_peak()
        vqref.quantize(latents, codebook)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        answer = arguments.latents * (2 + code_size) * 8 / 2**20
        found = {"seconds": seconds, "MiB": peak, "answer": answer, "MiB of a tenth": tenth}
        record.figures[f"quantize, {code_size}"] = found
        record.say(
            f"quantize, {arguments.latents} latents x 16384 codes of {code_size}: {seconds:.0f} s, "
            f"peak {peak:.0f} MiB, of which {answer:.0f} the answer (a tenth of the latents: {tenth:.0f} MiB)"
        )
    record.write()


if __name__ == "__main__":
    main()
