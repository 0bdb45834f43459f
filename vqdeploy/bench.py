"""How fast a bundle runs here: images and tokens a second over batch sizes, beside PyTorch where that is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.bundle import Bundle
from vqdeploy.codec import Codec
from vqdeploy.samples import draw_images

Array = npt.NDArray[Any]

WARM_UP = 3


def bench(bundle: Path, device: str, batches: Sequence[int], seconds: float) -> dict[str, Any]:
    """{device, providers, rows}, a row for each direction, batch and implementation: median and 99th percentile in
    milliseconds a call, images and tokens a second at the median. Implementations take turns, call by call."""
    found = Bundle.open(bundle)
    params = found.oracle().params
    rows = []
    with Codec.load(bundle, device) as codec:
        runners: dict[str, dict[str, Callable[[Array], Any]]] = {
            "encode": {"codec": codec.encode},
            "decode": {"codec": codec.decode},
        }
        for direction, run in _torch_runners(found, params, codec.device).items():
            runners[direction]["torch"] = run
        for batch in batches:
            images = draw_images(found.spec, params, batch)
            inputs: dict[str, Array] = {"encode": images, "decode": codec.encode(images)}
            for direction, by_name in runners.items():
                times = _alternate(by_name, inputs[direction], seconds)
                for name, taken in times.items():
                    median = float(np.median(taken))
                    rows.append(
                        {
                            "direction": direction,
                            "batch": batch,
                            "implementation": name,
                            "calls": len(taken),
                            "p50_ms": 1e3 * median,
                            "p99_ms": 1e3 * float(np.quantile(taken, 0.99)),
                            "images_per_second": batch / median,
                            "tokens_per_second": batch * found.spec.latent_size / median,
                        }
                    )
        return {"device": codec.device, "providers": list(codec.providers), "rows": rows}


def _alternate(runners: dict[str, Callable[[Array], Any]], array: Array, seconds: float) -> dict[str, list[float]]:
    for run in runners.values():
        for _ in range(WARM_UP):
            run(array)
    times: dict[str, list[float]] = {name: [] for name in runners}
    end = time.perf_counter() + seconds * len(runners)
    while time.perf_counter() < end:
        for name, run in runners.items():
            start = time.perf_counter()
            run(array)
            times[name].append(time.perf_counter() - start)
    return times


def _torch_runners(bundle: Bundle, params: dict[str, Array], device: str) -> dict[str, Callable[[Array], Any]]:
    """The trainer's module with the bundle's parameters, eager; nothing where PyTorch is not installed."""
    try:
        import torch

        from vqtrain.model import VQVAE
    except ModuleNotFoundError:
        return {}
    model = VQVAE(bundle.spec, params).to(device if device == "cuda" else "cpu").eval()
    place = model.quantizer.codebook.device

    @torch.no_grad()
    def encode(images: Array) -> Any:
        return model.quantizer(model.encoder(torch.from_numpy(images).to(place)))[0].cpu().numpy()

    @torch.no_grad()
    def decode(indices: Array) -> Any:
        return model.decoder(model.quantizer.codebook[torch.from_numpy(indices).to(place)]).sigmoid().cpu().numpy()

    return {"encode": encode, "decode": decode}
