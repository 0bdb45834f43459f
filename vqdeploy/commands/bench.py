"""``vqdeploy bench``: measures how fast a bundle runs here, and PyTorch if it is installed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqdeploy.bundle import Bundle
from vqdeploy.codec import Codec
from vqdeploy.commands.shared import BundleOptions, require_room
from vqdeploy.runtime.sessions import quiet
from vqref.errors import ExitCode
from vqref.host.commandline import Command, option, positive, real
from vqref.validation import Array

BATCHES = (1, 16, 256)
WARM_UP = 3

DIFFERENT_IMAGES = 256
"""A larger batch repeats these: that takes as long, and the oracle draws images slowly."""

LONGEST = 3600.0
"""The most seconds that ``--seconds`` takes."""

Runner = Callable[[Array], Any]


@dataclass(frozen=True, kw_only=True)
class BenchOptions(BundleOptions):
    """What to measure, and for how long."""

    batch: list[int] | None = option(
        "--batch",
        default=None,
        type=positive,
        action="append",
        metavar="N",
        help="batch size to measure; may be repeated (default: 1, 16, 256)",
    )
    seconds: float = option(
        "--seconds",
        default=2.0,
        type=real(0, LONGEST),
        metavar="X",
        help="seconds to measure each direction, batch size and implementation",
    )
    json: bool = option("--json", default=False, action="store_true", help="print JSON")


def run(options: BenchOptions) -> int:
    bundle = Bundle.open(options.bundle)
    for batch in options.batch or BATCHES:
        require_room("--batch", batch, bundle.spec)
    quiet()
    inputs = dict(_inputs(bundle, options))
    with _opened(options, options.threads) as codec:
        runners = _runners(bundle, codec, options.threads)
        rows = list(_measure(bundle, runners, inputs, options.seconds))
    if codec.device == "cpu" and options.threads is None:
        for count in _thread_counts():  # each alone: pools of threads disturb each other
            with _opened(options, count) as other:
                name = f"{count} thread{'s' if count > 1 else ''}"
                runners = {"encode": {name: other.encode}, "decode": {name: other.decode}}
                rows += _measure(bundle, runners, inputs, options.seconds)
        rows.sort(key=lambda row: (list(inputs).index(row["batch"]), row["direction"] == "decode"))
    if options.json:
        providers = list(codec.providers)
        print(json.dumps({"device": codec.device, "providers": providers, "rows": rows}, indent=2))
        return ExitCode.DONE
    print(f"{options.bundle} on {codec.device}: {', '.join(codec.providers)}")
    print("            batch             p50 ms    p99 ms  images/s    tokens/s   calls")
    for row in rows:
        print(
            f"{row['direction']:<12}{row['batch']:>5}  {row['implementation']:<10}"
            f"{row['p50_ms']:>7.3f}{row['p99_ms']:>10.3f}{row['images_per_second']:>10.0f}"
            f"{row['tokens_per_second']:>12.0f}{row['calls']:>8}"
        )
    return ExitCode.DONE


def _opened(options: BenchOptions, threads: int | None) -> Codec:
    return Codec.load(options.bundle, options.device, intra_op_num_threads=threads)


def _thread_counts() -> list[int]:
    """Returns the powers of two below the number of cores, and that number."""
    cores = os.cpu_count() or 1
    return [*(2**i for i in range(cores.bit_length()) if 2**i < cores), cores]


def _inputs(bundle: Bundle, options: BenchOptions) -> Iterator[tuple[int, dict[str, Array]]]:
    """Yields each batch size with what each direction takes: drawn images, and random tokens."""
    from vqdeploy.proof.samples import draw_images

    params = bundle.oracle().params
    for batch in options.batch or BATCHES:
        drawn = draw_images(bundle.spec, params, min(batch, DIFFERENT_IMAGES))
        images = np.resize(drawn, (batch, *bundle.spec.image_shape))
        rng = np.random.default_rng(0)
        indices = rng.integers(bundle.spec.num_codes, size=(batch, bundle.spec.latent_size))
        yield batch, {"encode": images, "decode": indices}


def _measure(
    bundle: Bundle,
    runners: Mapping[str, Mapping[str, Runner]],
    inputs: Mapping[int, Mapping[str, Array]],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Yields a row per batch, direction and implementation: median and 99th percentile in
    milliseconds per call, and images and tokens per second at the median."""
    for batch, by_direction in inputs.items():
        for direction, by_name in runners.items():
            for name, taken in _alternate(by_name, by_direction[direction], seconds).items():
                median = float(np.median(taken))
                yield {
                    "direction": direction,
                    "batch": batch,
                    "implementation": name,
                    "calls": len(taken),
                    "p50_ms": 1e3 * median,
                    "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
                    "images_per_second": batch / median,
                    "tokens_per_second": batch * bundle.spec.latent_size / median,
                }


def _alternate(
    runners: Mapping[str, Runner], array: Array, seconds: float
) -> dict[str, list[float]]:
    """Returns the seconds of each call, at least one; implementations take turns at every call."""
    for run in runners.values():
        for _ in range(WARM_UP):
            run(array)
    times: dict[str, list[float]] = {name: [] for name in runners}
    end = time.perf_counter() + seconds * len(runners)
    while True:
        for name, run in runners.items():
            start = time.perf_counter()
            run(array)
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() >= end:
            return times


def _runners(bundle: Bundle, codec: Codec, threads: int | None) -> dict[str, dict[str, Runner]]:
    """Returns {direction: {implementation: function}}. If PyTorch is installed, "torch" is the
    trainer's module with the bundle's parameters, in eager mode."""
    runners: dict[str, dict[str, Runner]] = {
        "encode": {"codec": codec.encode},
        "decode": {"codec": codec.decode},
    }
    try:
        import torch

        from vqtrain.likelihoods import mean
        from vqtrain.model import VQVAE
    except ModuleNotFoundError:
        return runners
    if threads is not None:
        torch.set_num_threads(threads)
    model = VQVAE(bundle.spec, bundle.oracle().params)
    model = model.to("cuda" if codec.device == "cuda" else "cpu").eval()
    codebook = model.quantizer.codebook

    @torch.no_grad()
    def encode(images: Array) -> Any:
        latents = model.encoder(torch.from_numpy(images).to(codebook.device))
        return model.quantizer(latents)[0].cpu().numpy()

    @torch.no_grad()
    def decode(indices: Array) -> Any:
        outputs = model.decoder(codebook[torch.from_numpy(indices).to(codebook.device)])
        return mean(bundle.spec, outputs).cpu().numpy()

    runners["encode"]["torch"] = encode
    runners["decode"]["torch"] = decode
    return runners


COMMAND = Command(
    "bench",
    "measure images and tokens per second, by numbers of threads, and PyTorch's if installed",
    BenchOptions,
    run,
)
