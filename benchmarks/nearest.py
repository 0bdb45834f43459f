"""``python -m benchmarks.nearest``: measures the nearest code and the moving averages at scale.

Compares ours with a single bare matrix product of the same size, with vector-quantize-pytorch and
with faiss, and shows how time and memory grow.

Each implementation works in a process of its own on the same normal latents (N, D) and codebook (K,
D). Memory is the largest growth of the process after its inputs were there. Ours gives the answers
of the direct form in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Record, Worker, in_turns, parser, serve, summary

N, K, D = 65_536, 16_384, 64
LATENTS = tuple(2**n for n in range(10, 21, 2))
CODES = tuple(2**n for n in range(6, 17, 2))


def inputs(n: int, k: int) -> tuple[Any, Any]:
    """Returns latents (n, D) and codebook (k, D) as tensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator), torch.randn(k, D, generator=generator)


def ours(n: int, k: int) -> Callable[[], Any]:
    """Returns what computes indices and the averages' next state."""
    import torch

    from vqtrain.nearest import nearest
    from vqtrain.quantizer import update_ema

    latents, codebook = inputs(n, k)
    count = torch.ones(k)

    def run() -> Any:
        indices = nearest(latents[:, None], codebook)
        return update_ema(codebook, count, codebook, latents[:, None], indices, 0.99, 1e-5)

    return run


def product(n: int, k: int) -> Callable[[], Any]:
    """Returns what computes only latents x codebook^T, into an existing array."""
    import torch

    latents, codebook = inputs(n, k)
    columns, result = codebook.T.contiguous(), torch.zeros(n, k)
    return lambda: torch.mm(latents, columns, out=result)


def library(n: int, k: int) -> Callable[[], Any]:
    """Returns what takes a training step of vector-quantize-pytorch's quantizer."""
    import torch
    from vector_quantize_pytorch import VectorQuantize

    latents, codebook = inputs(n, k)
    quantizer = VectorQuantize(dim=D, codebook_size=k, decay=0.99)
    quantizer._codebook.embed.copy_(codebook[None])
    quantizer.train()

    def run() -> Any:
        with torch.no_grad():
            return quantizer(latents[None])

    return run


def faiss(n: int, k: int) -> Callable[[], Any]:
    """Returns what searches with faiss's exact index, and does nothing else."""
    import faiss as library

    latents, codebook = (tensor.numpy() for tensor in inputs(n, k))
    index = library.IndexFlatL2(D)
    index.add(codebook)
    return lambda: index.search(latents, 1)


KINDS = {"ours": ours, "product": product, "library": library, "faiss": faiss}


def beside_peers(record: Record, rounds: int) -> None:
    record.say(
        f"{N} latents, {K} codes of {D}      median s       10-90 %  over product  grown MiB"
    )
    names = {
        "bare product": "product",
        "ours: nearest and averages": "ours",
        "faiss: nearest": "faiss",
    }
    for group, turns in (
        (names, rounds),
        ({"bare product ": "product", "vector-quantize-pytorch": "library"}, 2),
    ):
        workers: dict[str, Worker] = {}
        for name, kind in group.items():
            try:
                workers[name] = Worker("benchmarks.nearest", "serve", kind, str(N), str(K))
            except RuntimeError as error:
                record.say(f"{name}: skipped: {error}")
        times = in_turns(workers, rounds=turns)
        base = float(np.median(times[next(iter(group))]))
        for name, taken in times.items():
            found = summary(taken) | {"grown": workers[name].grown}
            record.figures[name] = found
            record.say(
                f"{name:<38}{found['median']:>10.2f}{found['low']:>8.2f}-{found['high']:<6.2f}"
                f"{found['median'] / base:>12.2f}x{found['grown']:>11.0f}"
            )
        for worker in workers.values():
            worker.close()


def growth(record: Record) -> None:
    """Measures time and memory over N at the K above, and over K at the N above.

    Each size has a process of its own.
    """
    sizes = {"N": [(n, K) for n in LATENTS], "K": [(N, k) for k in CODES]}
    for name, points in sizes.items():
        rows = []
        record.say(
            f"ours, {name} growing{'seconds':>16}{'ns a pair':>12}{'grown MiB':>12}"
            f"{'answer MiB':>12}"
        )
        for n, k in points:
            worker = Worker("benchmarks.nearest", "serve", "ours", str(n), str(k))
            seconds = float(
                np.median(in_turns({"ours": worker}, rounds=3 if n * k <= N * K else 1)["ours"])
            )
            worker.close()
            answer = (8 * n + 4 * k * (1 + 2 * D)) / 2**20  # indices, and the averages' next state
            found = {"latents": n, "codes": k, "seconds": seconds}
            rows.append(found | {"grown": worker.grown, "answer": answer})
            record.say(
                f"{n:>9} x {k:<7}{seconds:>15.4f}{1e9 * seconds / (n * k):>12.2f}"
                f"{worker.grown:>12.0f}{answer:>12.0f}"
            )
        record.figures[f"growth with {name}"] = rows


def draw(record: Record, path: Path) -> None:
    """Draws the growth in two panels: seconds, and MiB without the answer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, unit, fixed in (("N", "latents", f"{K:,} codes"), ("K", "codes", f"{N:,} latents")):
        rows = record.figures[f"growth with {name}"]
        sizes = [row[unit] for row in rows]
        label = f"{unit} growing, {fixed}"
        (line,) = time_axes.plot(sizes, [row["seconds"] for row in rows], "o-", label=label)
        last = rows[-1]
        time_axes.plot(
            sizes, [last["seconds"] * n / sizes[-1] for n in sizes], ":", color=line.get_color()
        )
        memory_axes.plot(sizes, [row["grown"] for row in rows], "o-", label=label)
        memory_axes.plot(sizes, [row["answer"] for row in rows], ":", color=line.get_color())
    time_axes.set(
        xscale="log",
        yscale="log",
        xlabel="latents or codes",
        ylabel="seconds",
        title="time (dotted: linear)",
    )
    memory_axes.set(
        xscale="log",
        xlabel="latents or codes",
        ylabel="MiB",
        title="memory (dotted: the answer itself)",
    )
    memory_axes.set_ylim(bottom=0)
    time_axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7, help="of each (default: %(default)s)")
    options.add_argument(
        "--plot", type=Path, metavar="PNG", help="where to draw how time and memory grow"
    )
    arguments = options.parse_args()
    record = Record(arguments)
    beside_peers(record, arguments.rounds)
    growth(record)
    if arguments.plot:
        draw(record, arguments.plot)
    record.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(KINDS[sys.argv[2]](int(sys.argv[3]), int(sys.argv[4])))
    else:
        main()
