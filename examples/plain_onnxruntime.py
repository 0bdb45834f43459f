"""Prints the tokens of images as JSON, with numpy and onnxruntime alone:
`python plain_onnxruntime.py BUNDLE IMAGES.npy`.

IMAGES.npy holds uint8 images (N, H, W) or (N, C, H, W). The bundle's manifest says what the graph
is called, takes and gives; its bytes are held to the manifest's sha256 before onnxruntime sees
them.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, which starts it
import onnxruntime as ort

BATCH = 64  # images per call


def main(bundle: str, images_file: str) -> None:
    folder = Path(bundle)
    manifest = json.loads((folder / "manifest.json").read_text())
    graph = manifest["graphs"]["tokenizer"]
    content = (folder / graph["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][graph["file"]]["sha256"]:
        raise SystemExit(f"{graph['file']}: damaged")

    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    taken, given = graph["inputs"][0], graph["outputs"][0]
    images = np.load(images_file, allow_pickle=False)
    images = images[:, None] if images.ndim == 3 else images
    if list(images.shape[1:]) != taken["shape"][1:]:
        raise SystemExit(f"images are {images.shape}, expected {taken['shape']}")
    tokens = []
    for first in range(0, len(images), BATCH):
        levels = images[first : first + BATCH].astype(np.float32) / np.float32(255)
        tokens += session.run([given["name"]], {taken["name"]: levels})[0].tolist()
    print(json.dumps(tokens))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
