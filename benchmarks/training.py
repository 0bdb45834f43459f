"""``python -m benchmarks.training``: one training step of the post's network on the CPU, ours beside its peers, in turns.

Batches of 64. Peers, eager and float32, around the same encoder and decoder in PyTorch's own modules: vector-quantize-pytorch
as its README shows it, and the post's step written plainly. The limit is the best rate of a matrix product, measured in the
same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vqref
from benchmarks.machine import describe
from vqref.spec import Layer
from vqtrain import VQVAE, TrainingOptions
from vqtrain.options import RECIPES
from vqtrain.quantizer import Quantizer
from vqtrain.rules import Rules
from vqtrain.train import make_optimizer, prepare, training_step

BATCH = 64


def images() -> torch.Tensor:
    """Noise: what a step takes does not depend on what it sees."""
    return torch.rand(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def ours(precision: str) -> Callable[[], Any]:
    options = TrainingOptions(precision=precision)
    spec = vqref.ModelSpec()
    model = prepare(VQVAE(spec, vqref.init_params(spec, np.random.default_rng(0))), torch.device("cpu"))
    optimizer, rules, batch = make_optimizer(model, options), Rules(options, 10**6), images()
    return lambda: training_step(model, optimizer, batch, options, rules, 0)


def usual(layers: Sequence[Layer]) -> nn.Sequential:
    """The rows of the table as PyTorch's own modules, as one writes them without our trainer."""
    modules: list[nn.Module] = []
    for layer in layers:
        inputs, outputs = layer.in_shape[0], layer.out_shape[0]
        if layer.kind == "reshape":
            modules.append(nn.Flatten())
            if len(layer.out_shape) > 1:
                modules.append(nn.Unflatten(1, layer.out_shape))
            continue
        if layer.kind == "dense":
            modules.append(nn.Linear(inputs, outputs))
        else:
            (top, bottom), (left, right) = layer.pads
            if layer.kind == "conv":
                modules.append(nn.ZeroPad2d((left, right, top, bottom)))
                modules.append(nn.Conv2d(inputs, outputs, layer.kernel, layer.stride))
            else:
                more = layer.stride - 1  # the size that stride 2 leaves open
                modules.append(
                    nn.ConvTranspose2d(inputs, outputs, layer.kernel, layer.stride, padding=bottom, output_padding=more)
                )
        if layer.activation == "elu":
            modules.append(nn.ELU())
    return nn.Sequential(*modules)


def peer() -> Callable[[], Any]:
    """vector-quantize-pytorch between encoder and decoder, as its README trains an autoencoder."""
    from vector_quantize_pytorch import VectorQuantize

    spec, options = vqref.ModelSpec(), RECIPES["seed"]
    encoder, decoder = usual(spec.encoder), usual(spec.decoder)
    quantizer = VectorQuantize(dim=spec.code_size, codebook_size=spec.num_codes, decay=0.99, commitment_weight=0.25)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=options.learning_rate)
    batch = images()

    def step() -> None:
        latents = encoder(batch)
        quantized, _, commitment = quantizer(latents)
        logits = decoder(quantized)
        loss = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum") / BATCH + commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def plain() -> Callable[[], Any]:
    """The post's step in PyTorch's own modules: one-hot sums, eager, float32."""
    spec, options = vqref.ModelSpec(), RECIPES["seed"]
    encoder, decoder, quantizer = usual(spec.encoder), usual(spec.decoder), Quantizer(spec)
    quantizer.codebook.normal_()
    quantizer.ema_means.copy_(quantizer.codebook)
    quantizer.ema_count.fill_(1.0)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=options.learning_rate)
    batch = images()

    def step() -> None:
        latents = encoder(batch)
        indices = torch.cdist(latents.reshape(-1, spec.code_size), quantizer.codebook).argmin(-1)
        quantized = quantizer.codebook[indices].reshape(latents.shape)
        logits = decoder(latents + (quantized - latents).detach())
        commitment = F.mse_loss(latents, quantized)
        loss = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum") / BATCH + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits = F.one_hot(indices, spec.num_codes).float()
        with torch.no_grad():
            quantizer.ema_count.mul_(0.99).add_(hits.sum(0), alpha=0.01)
            quantizer.ema_means.mul_(0.99).add_(hits.T @ latents.reshape(-1, spec.code_size), alpha=0.01)
            quantizer.codebook.copy_(quantizer.ema_means / (quantizer.ema_count + 1e-5)[:, None])

    return step


def products() -> dict[str, float]:
    """The best rate of a product of two square matrices, in floating-point operations a second, by precision."""
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        best = 0.0
        for n in (1024, 2048, 4096):
            a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
            for _ in range(4):
                start = time.perf_counter()
                a @ b
                best = max(best, 2 * n**3 / (time.perf_counter() - start))
        rates[name] = best
    return rates


def operations(spec: vqref.ModelSpec) -> float:
    """Floating-point operations of one step: each product forward, and twice as many back."""
    total = 0
    for layer in spec.layers:
        if not layer.parameters:
            continue
        weight = int(np.prod(layer.parameters[0].shape))
        positions = layer.in_shape if layer.kind == "conv_transpose" else layer.out_shape
        total += 2 * weight * int(np.prod(positions[1:]))
    return 3.0 * total * BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to store the figures")
    arguments = parser.parse_args()
    steps: dict[str, Callable[[], Any]] = {
        "ours, float32": ours("float32"),
        "ours, bfloat16": ours("bfloat16"),
        "plain PyTorch": plain(),
    }
    try:
        steps["vector-quantize-pytorch"] = peer()
    except ModuleNotFoundError:
        print("vector-quantize-pytorch: not installed; pip install -e '.[peers]'")
    print(describe())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(2):
            step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    rates, needed = products(), operations(vqref.ModelSpec())
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    slowest = medians.get("vector-quantize-pytorch", medians["plain PyTorch"])
    print(f"{'one step, batch of 64':<26}{'median ms':>10}{'10-90 %':>14}{'faster by':>11}{'of limit':>10}")
    for name, median in medians.items():
        low, high = (1e3 * float(np.quantile(times[name], q)) for q in (0.1, 0.9))
        limit = needed / rates["bfloat16" if "bfloat16" in name else "float32"]
        print(f"{name:<26}{1e3 * median:>10.1f}{low:>8.0f}-{high:<5.0f}{slowest / median:>10.2f}x{limit / median:>10.0%}")
    print(
        f"limit: {needed / 1e9:.1f} Gflop a step; products at {rates['float32'] / 1e9:.0f} (float32) "
        f"and {rates['bfloat16'] / 1e9:.0f} Gflop/s (bfloat16)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe(), "times": times, "rates": rates, "operations": needed}))


if __name__ == "__main__":
    main()
