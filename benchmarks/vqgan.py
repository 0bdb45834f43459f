"""``python -m benchmarks.vqgan``: measures time and memory of an imported VQGAN.

The model is diffusers' VQModel of 128 channels, multipliers (1, 1, 2, 2, 4) and 2 blocks: 256x256
colour, 256 tokens of 1,024 codes of 256 elements.

Measures seconds and peak memory of ``vqdeploy import``, ``export`` and ``verify``, each in a
process of its own, and counts the nodes of the graphs. Measures seconds and peak memory of encoding
one image to tokens and of decoding one from tokens, by the Codec and by diffusers eager in PyTorch,
in turns and with equally many threads. Measures how far the graphs' latents, tokens and outputs are
from diffusers'. Weights are random; the codebook has a latent of random fields for each code.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Record, Worker, in_turns, parser, peak, serve, spent, summary
from benchmarks.pictures import fields

CHANNELS, MULTIPLIERS, BLOCKS = 128, (1, 1, 2, 2, 4), 2
CODES, CODE_SIZE = 1024, 256
LEVELS = len(MULTIPLIERS)
GRAPHS = ("encoder", "quantizer", "decoder", "tokenizer", "detokenizer")
COMPARED = 4
"""Images whose latents, tokens and outputs are compared."""


def images(pixels: int, count: int, seed: int = 0) -> Any:
    """Returns random fields (N, 3, H, W), float32 in [0, 1]."""
    return fields(count, (3, pixels, pixels), seed).astype(np.float32) / 255


def make(folder: Path, pixels: str, channels: str) -> None:
    """Saves a VQModel with the latents of other images as its codebook."""
    import torch
    from diffusers import VQModel

    torch.manual_seed(0)
    plain = LEVELS - 1
    model = VQModel(
        block_out_channels=tuple(int(channels) * each for each in MULTIPLIERS),
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        layers_per_block=BLOCKS,
        latent_channels=CODE_SIZE,
        num_vq_embeddings=CODES,
        vq_embed_dim=CODE_SIZE,
        sample_size=int(pixels),
    )
    places = (int(pixels) // 2**plain) ** 2
    with torch.no_grad():
        given = torch.from_numpy(images(int(pixels), -(-CODES // places), seed=1))
        latents = torch.cat([model.encode(2 * image - 1).latents for image in given[:, None]])
        rows = latents.permute(0, 2, 3, 1).reshape(-1, CODE_SIZE)
        model.quantize.embedding.weight.copy_(rows[:CODES])
    model.save_pretrained(folder)


def loaded(folder: Path, threads: str) -> Any:
    """Loads the model in diffusers, on this many threads."""
    import torch
    from diffusers import VQModel

    torch.set_num_threads(int(threads))
    torch.set_grad_enabled(False)
    return VQModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def tokens_of(model: Any, images: Any) -> tuple[Any, Any]:
    """Returns latents (N, D, h, w) and tokens (N*h*w,) of images in [0, 1]."""
    latents = model.encode(2 * images - 1).latents
    return latents, model.quantize(latents)[2][2]


def outputs_of(model: Any, tokens: Any, side: int) -> Any:
    """Returns outputs (N, C, H, W) in [-1, 1] of tokens."""
    shape = (len(tokens) // side**2, side, side, CODE_SIZE)
    quantized = model.quantize.get_codebook_entry(tokens, shape)
    return model.decode(quantized, force_not_quantize=True).sample


def eager(way: str, folder: Path, pixels: str, threads: str) -> Callable[[], Any]:
    """Returns the encoding or decoding of one image in diffusers."""
    import torch

    model = loaded(folder / "theirs", threads)
    if way == "encode":
        return partial(tokens_of, model, torch.from_numpy(images(int(pixels), 1)))
    side = int(pixels) // 2 ** (LEVELS - 1)
    tokens = torch.arange(side**2) * 7 % CODES

    def decode() -> Any:
        return (outputs_of(model, tokens, side) / 2 + 0.5).clamp(0, 1)

    return decode


def codec(way: str, folder: Path, pixels: str, threads: str) -> Callable[[], Any]:
    """Returns the same for a Codec."""
    from vqdeploy import Codec

    opened = Codec.load(folder / "bundle", "cpu", intra_op_num_threads=int(threads))
    if way == "encode":
        return partial(opened.encode, images(int(pixels), 1))
    places = (int(pixels) // 2 ** (LEVELS - 1)) ** 2
    return partial(opened.decode, (np.arange(places) * 7 % CODES)[None])


KINDS = {"diffusers eager": eager, "Codec": codec}


def compared(folder: Path, pixels: str, threads: str) -> dict[str, Any]:
    """Compares the graphs with diffusers: the largest differences, and the tokens that differ.

    Differences are divided by the largest magnitude. Tokens are judged on diffusers' latents.
    """
    import torch

    from vqdeploy.bundle import Bundle
    from vqdeploy.runtime.sessions import open_sessions
    from vqref.agreement.parity import check_indices
    from vqref.spec import CODEBOOK

    model, bundle = loaded(folder / "theirs", threads), Bundle.open(folder / "bundle")
    graphs = {stage: bundle.graph(stage) for stage in ("encoder", "tokenizer", "decoder")}
    sessions, _ = open_sessions(graphs, bundle.spec, "cpu")
    given, codebook = images(int(pixels), COMPARED), bundle.oracle().params[CODEBOOK]
    side, found = bundle.spec.latent_shape[0], dict[str, Any]()
    theirs, tokens = zip(
        *(tokens_of(model, torch.from_numpy(image)) for image in given[:, None]), strict=True
    )
    latents = torch.cat(theirs).permute(0, 2, 3, 1).reshape(COMPARED, -1, CODE_SIZE).numpy()
    outputs = torch.cat([outputs_of(model, each, side) for each in tokens]).numpy()
    indices = torch.stack(tokens).numpy()
    ours = sessions["encoder"](given)[0]
    found["latents"] = _over_scale(ours, latents)
    judged = check_indices(
        sessions["tokenizer"](given)[0],
        latents,
        codebook,
        precision="float32",
        latents_error=np.linalg.norm(ours.astype(np.float64) - latents, axis=2),
    )
    found["tokens"], found["near ties"] = indices.size, judged.near_ties
    found["certified that differ"] = judged.violations
    found["outputs"] = _over_scale(sessions["decoder"](codebook[indices])[0], outputs)
    return found


def _over_scale(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nodes(bundle: Path) -> dict[str, int]:
    """Returns the number of nodes of each graph."""
    from vqdeploy.runtime.protobuf import read_graph

    return {
        stage: len(read_graph(f"{stage}.onnx", (bundle / f"{stage}.onnx").read_bytes()).nodes)
        for stage in GRAPHS
    }


def say_turns(record: Record, folder: Path, pixels: str, threads: str, rounds: int) -> None:
    """Encodes one image and decodes one, in turns."""
    title = f"one image, threads: {threads}"
    record.say(f"{title:<28}{'median s':>10}{'10-90 %':>14}{'peak MiB':>10}")
    for way in ("encode", "decode"):
        workers = {
            name: Worker("benchmarks.vqgan", "serve", name, way, str(folder), pixels, threads)
            for name in KINDS
        }
        times = in_turns(workers, rounds=rounds, pause=0.1)
        for name, worker in workers.items():
            row = {**summary(times[name]), "peak": worker.said["peak"] + worker.grown}
            record.figures[f"{way}, {name}"] = row
            record.say(
                f"{f'{way}, {name}':<28}{row['median']:>10.2f}"
                f"{row['low']:>8.2f}-{row['high']:<5.2f}{row['peak']:>10.0f}"
            )
            worker.close()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pixels", default="256", help="of a side (default: %(default)s)")
    options.add_argument("--channels", default=str(CHANNELS), help="(default: %(default)s)")
    options.add_argument("--threads", default="2", help="of both (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=9, help="of each (default: %(default)s)")
    options.add_argument("--part", nargs="+", help="one part, in this process")
    arguments = options.parse_args()
    if arguments.part:
        name, folder, *words = arguments.part
        print(json.dumps({"make": make, "compared": compared}[name](Path(folder), *words)))
        return
    record, own = Record(arguments), ["-m", "benchmarks.vqgan", "--part"]
    pixels, threads = arguments.pixels, arguments.threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs, model, bundle = (str(folder / each) for each in ("theirs", "model.pt", "bundle"))
        spent([*own, "make", theirs, pixels, arguments.channels])
        record.say(f"{'':<28}{'seconds':>10}{'of a core':>14}{'peak MiB':>10}")
        for command in (
            ["import", theirs, "--output", model],
            ["export", model, "--output", bundle],
            ["verify", bundle],
        ):
            title, taken = f"vqdeploy {command[0]}", spent(["-m", "vqdeploy", *command])
            record.figures[title] = {n: getattr(taken, n) for n in ("seconds", "busy", "peak")}
            record.say(f"{title:<28}{taken.seconds:>10.1f}{taken.busy:>14.1f}{taken.peak:>10.0f}")
        record.figures["nodes"] = nodes(Path(bundle))
        counts = (f"{stage} {count}" for stage, count in record.figures["nodes"].items())
        record.say(f"nodes: {', '.join(counts)}")
        say_turns(record, folder, pixels, threads, arguments.rounds)
        found = json.loads(spent([*own, "compared", str(folder), pixels, threads]).printed)
        record.figures["compared"] = found
        record.say(
            f"beside diffusers, over the largest: latents {found['latents']:.1e}, outputs "
            f"{found['outputs']:.1e}; of {found['tokens']} tokens {found['near ties']} near ties, "
            f"{found['certified that differ']} certified ones differ"
        )
    record.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        kind, way, path, *words = sys.argv[2:]
        serve(KINDS[kind](way, Path(path), *words), peak=peak())
    else:
        main()
