"""Draws the tokens of samples from a bundle with a learned prior, with numpy and onnxruntime alone:
`python samples.py BUNDLE COUNT [--seed N] [--temperature X] [--decode FOLDER]`.

Prints them as JSON, a row per sample. Token s is the code of the largest log p / temperature +
noise, given the tokens before it. The noise of sample i is a function of the seed and i alone: of
each word of NumPy's Philox, which begins at counter i * 2^192, the upper 52 bits are u = (bits +
1/2) / 2^52, and the noise is -log(-log(u)). samples.js draws the same. With --decode, the images go
to FOLDER as 0.png, 1.png, ….
"""

import argparse
import json
from pathlib import Path

import numpy as np
from plain_onnxruntime import BATCH, opened, save


def main(bundle, count, seed, temperature, folder):
    manifest = json.loads((bundle / "manifest.json").read_text())
    positions, codes = (manifest["prior"]["spec"][name] for name in ("latent_size", "num_codes"))
    step, size = opened(bundle, manifest, "prior_step"), manifest["batch"] or BATCH
    rows = []
    for first in range(0, count, size):
        numbers = range(first, min(count, first + size))
        noise = np.stack([gumbel(seed, i, positions, codes) for i in numbers])
        rows.append(drawn(step, manifest, noise, temperature))
    tokens = np.concatenate(rows)
    print(json.dumps(tokens.tolist()))
    if folder:
        decode = opened(bundle, manifest, "detokenizer")
        parts = (tokens[i : i + size] for i in range(0, count, size))
        save(folder, [image for part in parts for image in decode(part)[0]])


def gumbel(seed, number, positions, codes):
    words = np.random.Philox(key=seed, counter=number << 192).random_raw(positions * codes)
    u = ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return -np.log(-np.log(u)).reshape(positions, codes)


def drawn(step, manifest, noise, temperature):
    """Tokens (N, S) of noise (N, S, K)."""
    count, positions, _ = noise.shape
    ports = {port["name"]: port for port in manifest["graphs"]["prior_step"]["inputs"]}
    keys = values = np.zeros((count, *ports["keys"]["shape"][1:]), np.float32)
    tokens = np.zeros((count, positions), np.int64)
    for s in range(positions):
        before = tokens[:, s - 1].astype(ports["previous"]["dtype"])
        log_p, keys, values = step(before, np.array([s]), keys, values)
        tokens[:, s] = (log_p.astype(np.float64) / temperature + noise[:, s]).argmax(axis=1)
    return tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--decode", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    main(given.bundle, given.count, given.seed, given.temperature, given.decode)
