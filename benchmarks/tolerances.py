"""``python -m benchmarks.tolerances``: measures the errors behind ``vqref.agreement.TOLERANCES``.

Runs untrained networks of several families, shapes and seeds on random and on blank images. PyTorch
runs in float64, in float32 and in the lower precisions; onnxruntime in those that can be exported.
Reports the largest error of each stage over all cases, and what is allowed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch

import vqref
from benchmarks.measure import Record, parser
from vqdeploy.agreement import check_graphs
from vqdeploy.graphs.build import GraphOptions, build_graphs
from vqdeploy.graphs.int8 import quantize_graphs
from vqdeploy.runtime.sessions import open_sessions
from vqref.agreement import Backend, Report, compare
from vqref.agreement.budget import images_within
from vqref.families import post, residual, vqgan
from vqref.spec import ModelSpec
from vqref.validation import Array, Params
from vqtrain import VQVAE, TrainingOptions
from vqtrain.agreement import check_against_oracle
from vqtrain.network import Row

SPECS = (
    post(),
    post(latent_size=4),
    post(code_size=2),
    post((3, 32, 32), base_depth=16, latent_size=16, num_codes=512, code_size=32),
    residual(),
    residual(depth=2, likelihood="logistic"),
    residual((3, 64, 64), downsample=16, blocks=4, num_codes=1024),
    residual((1, 28, 28), likelihood="bernoulli", num_codes=64),
    vqgan((3, 32, 32), 32, (1, 2), 1, num_codes=64, latent_channels=16, code_size=8),
)

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """Cuts the last 13 bits off, from float32 to TF32, as a tensor core may."""
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def reduced(spec: ModelSpec, params: Params, precision: str) -> Backend:
    """PyTorch's networks under autocast (bfloat16, float16), or with every factor cut to TF32."""
    model = VQVAE(spec, params)
    if precision == "tf32":
        for row in (module for module in model.modules() if isinstance(module, Row)):
            row.register_forward_pre_hook(lambda module, given: tuple(map(cut, given)))
            for name, parameter in row.named_parameters():
                if name == "weight":
                    parameter.data = cut(parameter.data)

    def decoder(quantized: Array) -> tuple[Array, Array]:
        outputs = answer(model.decoder, quantized)
        return outputs, vqref.reconstruct(spec, outputs).astype(np.float32)

    def answer(network: torch.nn.Module, array: Array) -> Array:
        autocast = torch.autocast(
            "cpu", HALF.get(precision, torch.bfloat16), enabled=precision in HALF
        )
        with torch.no_grad(), autocast:
            return np.asarray(network(torch.from_numpy(array)).float().numpy())

    return Backend(precision, encoder=lambda images: answer(model.encoder, images), decoder=decoder)


def sample(spec: ModelSpec, rng: np.random.Generator) -> Array:
    """Returns as many random images as one check may take.

    Half of their pixels are black; one image is all black, and one all white.
    """
    shape = (images_within(spec), *spec.image_shape)
    images = rng.random(shape) * rng.integers(0, 2, shape)
    images[0], images[1] = 0, 1
    return images.astype(np.float32)


def trainer_reports(spec: ModelSpec, params: Params, images: Array) -> Iterator[tuple[str, Report]]:
    """Compares PyTorch with the oracle in every precision."""
    options = TrainingOptions()
    double = {name: array.astype(np.float64) for name, array in params.items()}
    for precision, values in (("float64", double), ("float32", params)):
        report = check_against_oracle(VQVAE(spec, values), images, options)
        yield f"torch {precision}", report
    for precision in ("tf32", "float16", "bfloat16"):
        backend = reduced(spec, params, precision)
        yield f"torch {precision}", compare(spec, params, images, backend)


def graph_reports(spec: ModelSpec, params: Params, images: Array) -> Iterator[tuple[str, Report]]:
    """Compares onnxruntime with the oracle in every precision."""
    folds = GraphOptions().folds(spec)
    graphs, out = build_graphs(spec, params), vqref.forward(spec, params, images)
    quantized = out.quantized.astype(np.float32)
    inputs = {"images": images, "indices": out.indices, "quantized": quantized}
    forms = {
        "float32": graphs,
        "float16": build_graphs(spec, params, GraphOptions(precision="fp16")),
        "int8": quantize_graphs(graphs, inputs, folded=folds),
    }
    for precision, form in forms.items():
        sessions, _ = open_sessions(form, spec, "cpu")
        report = check_graphs(
            spec, params, images, sessions, precision=precision, folded=folds, known=out
        )
        yield f"onnxruntime {precision}", report


class Worst:
    """The largest errors and the sums of counts over all reports."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, str, float], float] = defaultdict(float)
        self.indices: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])

    def add(self, backend: str, report: Report) -> None:
        for check in report.checks:
            if check.allowed is not None:
                key = (backend, check.stage, check.allowed)
                error = np.inf if check.max_error is None else check.max_error
                self.errors[key] = max(self.errors[key], error)
            elif check.certified is not None:
                counts = self.indices[backend, check.stage]
                found = check.compared, check.near_ties or 0, check.flips or 0, check.violations
                counts[:] = map(sum, zip(counts, found, strict=True))

    def say(self, record: Record) -> None:
        record.say(f"{'backend':<21}{'stage':<16}{'largest error':>14}{'allowed':>9}{'share':>7}")
        for (backend, stage, allowed), error in self.errors.items():
            record.say(
                f"{backend:<21}{stage:<16}{error:>14.1e}{allowed:>9.0e}{error / allowed:>7.0%}"
            )
        record.say(
            f"{'backend':<21}{'stage':<16}{'compared':>9}{'near ties':>10}{'flips':>7}{'wrong':>7}"
        )
        for (backend, stage), (compared, near_ties, flips, wrong) in self.indices.items():
            record.say(f"{backend:<21}{stage:<16}{compared:>9}{near_ties:>10}{flips:>7}{wrong:>7}")
        record.figures = {
            "errors": [[*key, error] for key, error in self.errors.items()],
            "indices": [[*key, *counts] for key, counts in self.indices.items()],
        }


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--seeds", type=int, default=3, help="of each network (default: %(default)s)"
    )
    arguments = options.parse_args()
    record, worst = Record(arguments), Worst()
    for spec in SPECS:
        for seed in range(arguments.seeds):
            rng = np.random.default_rng(seed)
            params = vqref.init_params(spec, rng)
            images = sample(spec, rng)
            for reports in (trainer_reports, graph_reports):
                for backend, report in reports(spec, params, images):
                    worst.add(backend, report)
    worst.say(record)
    record.write()


if __name__ == "__main__":
    main()
