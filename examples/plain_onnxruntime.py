"""Tokens of images by a bundle with numpy and onnxruntime alone: `python plain_onnxruntime.py BUNDLE IMAGES.npy` prints JSON.

IMAGES.npy holds uint8 images (N, H, W) or (N, C, H, W). What the graph is called, takes and gives is read from the bundle's
manifest; its bytes are held to the manifest's sha256 before onnxruntime sees them.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

BATCH = 64  # images a call


def main(bundle: str, images_file: str) -> None:
    folder = Path(bundle)
    manifest = json.loads((folder / "manifest.json").read_text())
    graph = manifest["graphs"]["tokenizer"]
    content = (folder / graph["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][graph["file"]]["sha256"]:
        raise SystemExit(f"{graph['file']}: damaged")

    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    taken, given = graph["inputs"][0], graph["outputs"][0]
    images = np.load(images_file, allow_pickle=False).reshape(-1, *taken["shape"][1:])
    tokens = []
    for first in range(0, len(images), BATCH):
        grey = images[first : first + BATCH].astype(np.float32) / np.float32(255)
        tokens += session.run([given["name"]], {taken["name"]: grey})[0].tolist()
    print(json.dumps(tokens))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
