"""``python -m benchmarks.tolerances``: the errors behind the rows of ``vqref.parity.TOLERANCES``.

Untrained networks of several shapes and seeds, on random images and on blank ones; PyTorch in float64 and float32,
onnxruntime in float32. The largest error of each stage over all cases, beside what is allowed.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import vqref
from benchmarks.measure import Record, parser
from vqdeploy.graphs import GraphOptions, build_graphs
from vqdeploy.int8 import quantize_graphs
from vqdeploy.sessions import open_sessions
from vqdeploy.verify import check_graphs
from vqref.agreement import Backend, compare
from vqref.report import Report
from vqref.validation import Params
from vqtrain import VQVAE, TrainingOptions
from vqtrain.agreement import check_against_oracle

Array = npt.NDArray[Any]

SPECS = (
    vqref.ModelSpec(),
    vqref.ModelSpec(latent_size=4),
    vqref.ModelSpec(code_size=2),
    vqref.ModelSpec((3, 32, 32), base_depth=16, latent_size=16, num_codes=512, code_size=32),
)


HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """float32 to TF32: the last 13 bits cut off, as a tensor core may."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def reduced(spec: vqref.ModelSpec, params: Params, precision: str) -> Backend:
    """PyTorch's networks under autocast (bfloat16, float16), or with every factor cut to TF32."""
    model = VQVAE(spec, params)
    if precision == "tf32":
        for row in [*model.encoder.children(), *model.decoder.children()]:
            row.register_forward_pre_hook(lambda module, given: tuple(map(cut, given)))
            for name, parameter in row.named_parameters():
                if name == "weight":
                    parameter.data = cut(parameter.data)

    def decoder(quantized: Array) -> tuple[Array, Array]:
        logits = answer(model.decoder, quantized)
        return logits, vqref.sigmoid(logits).astype(np.float32)

    def answer(network: torch.nn.Module, array: Array) -> Array:
        autocast = torch.autocast("cpu", HALF.get(precision, torch.bfloat16), enabled=precision in HALF)
        with torch.no_grad(), autocast:
            return np.asarray(network(torch.from_numpy(array)).float().numpy())

    return Backend(precision, encoder=lambda images: answer(model.encoder, images), decoder=decoder)


def main() -> None:
    record = Record(parser(__doc__).parse_args())
    largest: dict[tuple[str, str, float], float] = defaultdict(float)
    indices: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def note(backend: str, report: Report) -> None:
        for check in report.checks:
            if check.allowed is not None:
                key = (backend, check.stage, check.allowed)
                largest[key] = max(largest[key], np.inf if check.max_error is None else check.max_error)
            elif check.certified is not None and check.near_ties is not None and check.flips is not None:
                counts = (check.compared, check.near_ties, check.flips, check.violations)
                for i, count in enumerate(counts):
                    indices[backend, check.stage][i] += count

    for spec in SPECS:
        for seed in range(3):
            rng = np.random.default_rng(seed)
            params = vqref.init_params(spec, rng)
            images = rng.random((64, *spec.image_shape)) * rng.integers(0, 2, (64, *spec.image_shape))
            images[0], images[1] = 0, 1
            images = images.astype(np.float32)
            double = {name: array.astype(np.float64) for name, array in params.items()}
            note("torch float64", check_against_oracle(VQVAE(spec, double), images, TrainingOptions()))
            note("torch float32", check_against_oracle(VQVAE(spec, params), images, TrainingOptions()))
            for precision in ("tf32", "float16", "bfloat16"):
                note(f"torch {precision}", compare(spec, params, images, reduced(spec, params, precision)))
            folds = GraphOptions().folds(spec)
            graphs = build_graphs(spec, params)
            out = vqref.forward(spec, params, images)
            inputs = {"images": images, "indices": out.indices, "quantized": out.quantized.astype(np.float32)}
            forms = {
                "float32": graphs,
                "float16": build_graphs(spec, params, GraphOptions(precision="fp16")),
                "int8": quantize_graphs(graphs, inputs, folded=folds),
            }
            for precision, form in forms.items():
                sessions, _ = open_sessions(form, spec, "cpu")
                report = check_graphs(spec, params, images, sessions, precision=precision, folded=folds)
                note(f"onnxruntime {precision}", report)

    record.say(f"{'backend':<21}{'stage':<15}{'largest error':>14}{'allowed':>9}{'share':>7}")
    for (backend, stage, allowed), error in largest.items():
        record.say(f"{backend:<21}{stage:<15}{error:>14.1e}{allowed:>9.0e}{error / allowed:>7.0%}")
    record.say(f"{'backend':<21}{'stage':<15}{'compared':>9}{'near ties':>10}{'flips':>7}{'wrong':>7}")
    for (backend, stage), (compared, near_ties, flips, wrong) in indices.items():
        record.say(f"{backend:<21}{stage:<15}{compared:>9}{near_ties:>10}{flips:>7}{wrong:>7}")

    record.figures = {
        "errors": [[*key, error] for key, error in largest.items()],
        "indices": [[*key, *counts] for key, counts in indices.items()],
    }
    record.write()


if __name__ == "__main__":
    main()
