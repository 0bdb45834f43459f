"""``python -m benchmarks.codec BUNDLE``: the Codec beside bare onnxruntime sessions on the same arrays, call by call in turns;
the folded detokenizer beside the decoder's network; and what an import costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from benchmarks.machine import describe
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.samples import draw_images
from vqref.spec import CODEBOOK


def alternate(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds a call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def wall(*arguments: str) -> float:
    """Median seconds of a Python process, of five."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="+", help="the first beside bare sessions, all beside each other")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle[0])
    params = bundle.oracle().params
    codec = Codec.load(bundle.path, "cpu")
    stages = ("tokenizer", "detokenizer", "decoder")
    bare = {name: ort.InferenceSession(bundle.graph(name), providers=["CPUExecutionProvider"]) for name in stages}
    print(describe())
    print("             batch   bare ms   codec ms   overhead")
    for batch in (1, 16, 256):
        images = draw_images(bundle.spec, params, batch)
        indices = codec.encode(images)
        for direction, stage, array in (("encode", "tokenizer", images), ("decode", "detokenizer", indices)):
            port = bundle.manifest["graphs"][stage]["inputs"][0]["name"]
            session, run = bare[stage], getattr(codec, direction)

            def bare_call(session: Any = session, port: str = port, array: Any = array) -> Any:
                return session.run(None, {port: array})

            def codec_call(run: Any = run, array: Any = array) -> Any:
                return run(array)

            found = alternate({"bare": bare_call, "codec": codec_call}, arguments.seconds)
            more = found["codec"] - found["bare"]
            print(
                f"{direction:<13}{batch:>5}{1e3 * found['bare']:>10.3f}{1e3 * found['codec']:>11.3f}"
                f"{1e6 * more:>8.0f} us {more / found['bare']:>6.1%}"
            )
    compare_fold(bundle, bare, np.asarray(params[CODEBOOK], np.float32), arguments.seconds)
    if len(arguments.bundle) > 1:
        compare_bundles(arguments.bundle, draw_images(bundle.spec, params, 256), arguments.seconds)
    start = wall("-c", "pass")
    imported, helped = wall("-c", "from vqdeploy import Codec") - start, wall("-m", "vqdeploy", "--help") - start
    print(f"beyond python's own start: from vqdeploy import Codec {imported:.2f} s, python -m vqdeploy --help {helped:.2f} s")


def compare_fold(bundle: Bundle, bare: dict[str, Any], codebook: Any, seconds: float) -> None:
    """The detokenizer beside the decoder on the first codes in every position."""
    codes = np.arange(min(64, bundle.spec.num_codes))[:, None].repeat(bundle.spec.latent_size, axis=1)
    given = {"detokenizer": {"indices": codes}, "decoder": {"quantized": codebook[codes]}}
    runs = {name: partial(bare[name].run, ["probabilities"], feed) for name, feed in given.items()}
    found = alternate(runs, seconds)
    difference = np.abs(runs["detokenizer"]()[0] - runs["decoder"]()[0]).max()
    print(
        f"{len(codes)} rows of tokens: detokenizer ({bundle.manifest['detokenizer']}) {1e3 * found['detokenizer']:.3f} ms, ",
        end="",
    )
    print(f"decoder {1e3 * found['decoder']:.3f} ms, {found['decoder'] / found['detokenizer']:.0f} times; ", end="")
    print(f"largest difference {difference:.1e}")


def compare_bundles(paths: list[Path], images: Any, seconds: float) -> None:
    """Encoding in turns, beside what each manifest says."""
    bundles = [Bundle.open(path) for path in paths]
    found = alternate({str(path): partial(Codec.load(path, "cpu").encode, images) for path in paths}, seconds)
    first = found[str(paths[0])]
    print(f"encode, batch {len(images)}     ms   speed   tokenizer  equal tokens  nats lost")
    for bundle in bundles:
        taken, measured = found[str(bundle.path)], bundle.manifest["measured"]
        size = bundle.manifest["files"]["tokenizer.onnx"]["bytes"]
        print(
            f"{bundle.precision:<13}{1e3 * taken:>12.1f}{first / taken:>7.2f}x{size / 2**20:>8.2f} MiB"
            f"{measured['equal_tokens']:>13.2%}{measured['nats_lost']:>+12.4f}"
        )


if __name__ == "__main__":
    main()
