"""``python -m benchmarks.codec BUNDLE``: compares the Codec with bare onnxruntime sessions on the
same arrays, call by call in turns, and the folded detokenizer with the decoder's network. Also
measures what an import costs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.measure import Record, in_turns, parser, timed
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.proof.samples import draw_images
from vqref.spec import CODEBOOK


def alternate(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Returns the median seconds per call of each, in turns."""
    times = in_turns({name: partial(timed, run) for name, run in runs.items()}, seconds=seconds)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def wall(*arguments: str) -> float:
    """Returns the median seconds of five Python processes."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "bundle", type=Path, nargs="+", help="the first beside bare sessions, all beside each other"
    )
    options.add_argument("--seconds", type=float, default=5.0)
    arguments = options.parse_args()
    bundle = Bundle.open(arguments.bundle[0])
    params = bundle.oracle().params
    codec = Codec.load(bundle.path, "cpu")
    stages = ("tokenizer", "detokenizer", "decoder")
    bare = {
        name: ort.InferenceSession(bundle.graph(name), providers=["CPUExecutionProvider"])
        for name in stages
    }
    record = Record(arguments)
    record.say("             batch   bare ms   codec ms   overhead")
    for batch in (1, 16, 256):
        images = draw_images(bundle.spec, params, batch)
        indices = codec.encode(images)
        for direction, stage, array in (
            ("encode", "tokenizer", images),
            ("decode", "detokenizer", indices),
        ):
            port = bundle.manifest["graphs"][stage]["inputs"][0]["name"]
            session, run = bare[stage], getattr(codec, direction)

            def bare_call(session: Any = session, port: str = port, array: Any = array) -> Any:
                return session.run(None, {port: array})

            def codec_call(run: Any = run, array: Any = array) -> Any:
                return run(array)

            found = alternate({"bare": bare_call, "codec": codec_call}, arguments.seconds)
            more = found["codec"] - found["bare"]
            record.figures[f"{direction}, {batch}"] = found
            record.say(
                f"{direction:<13}{batch:>5}{1e3 * found['bare']:>10.3f}"
                f"{1e3 * found['codec']:>11.3f}{1e6 * more:>8.0f} us {more / found['bare']:>6.1%}"
            )
    compare_fold(record, bundle, bare, np.asarray(params[CODEBOOK], np.float32), arguments.seconds)
    if len(arguments.bundle) > 1:
        compare_bundles(
            record, arguments.bundle, draw_images(bundle.spec, params, 256), arguments.seconds
        )
    start = wall("-c", "pass")
    imported, helped = (
        wall("-c", "from vqdeploy import Codec") - start,
        wall("-m", "vqdeploy", "--help") - start,
    )
    record.say(
        f"beyond python's own start: from vqdeploy import Codec {imported:.2f} s, "
        f"python -m vqdeploy --help {helped:.2f} s"
    )
    record.figures["beyond python's own start"] = {"import": imported, "help": helped}
    record.write()


def compare_fold(
    record: Record, bundle: Bundle, bare: dict[str, Any], codebook: Any, seconds: float
) -> None:
    """Compares the detokenizer with the decoder on the first codes in every position."""
    codes = np.arange(min(64, bundle.spec.num_codes))[:, None].repeat(
        bundle.spec.latent_size, axis=1
    )
    given = {"detokenizer": {"indices": codes}, "decoder": {"quantized": codebook[codes]}}
    runs: dict[str, Callable[[], Any]] = {
        name: partial(bare[name].run, ["reconstructions"], feed) for name, feed in given.items()
    }
    found = alternate(runs, seconds)
    difference = np.abs(runs["detokenizer"]()[0] - runs["decoder"]()[0]).max()
    record.figures["fold"] = {**found, "largest difference": float(difference)}
    record.say(
        f"{len(codes)} rows of tokens: detokenizer ({bundle.manifest['detokenizer']}) "
        f"{1e3 * found['detokenizer']:.3f} ms, decoder {1e3 * found['decoder']:.3f} ms, "
        f"{found['decoder'] / found['detokenizer']:.0f} times; largest difference {difference:.1e}"
    )


def compare_bundles(record: Record, paths: list[Path], images: Any, seconds: float) -> None:
    """Measures encoding by each bundle, in turns; also prints what its manifest says."""
    bundles = [Bundle.open(path) for path in paths]
    found = alternate(
        {str(path): partial(Codec.load(path, "cpu").encode, images) for path in paths}, seconds
    )
    first = found[str(paths[0])]
    record.say(f"encode, batch {len(images)}     ms   speed   tokenizer  equal tokens  nats lost")
    for bundle in bundles:
        taken, measured = found[str(bundle.path)], bundle.manifest["measured"]
        record.figures[f"encode, {bundle.precision}"] = {"seconds": taken, **measured}
        size = bundle.manifest["files"]["tokenizer.onnx"]["bytes"]
        record.say(
            f"{bundle.precision:<13}{1e3 * taken:>12.1f}{first / taken:>7.2f}x"
            f"{size / 2**20:>8.2f} MiB{measured['equal_tokens']:>13.2%}"
            f"{measured['nats_lost']:>+12.4f}"
        )


if __name__ == "__main__":
    main()
