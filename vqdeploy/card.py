"""The model card: a bundle's README.md, for whoever is handed the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqref.checkpoint import Model
from vqref.report import Report


def write_card(
    model: Model, provenance: Mapping[str, Any], written: Mapping[str, Any], measured: Mapping[str, Any], report: Report
) -> str:
    """Markdown: what the model is, how to run it, what it was trained on and measured at, and the proof."""
    spec, data = model.spec, provenance.get("data", {})
    channels, height, width = spec.image_shape
    trained = ", ".join(f"{name} {value}" for name, value in model.training.items())
    return f"""# A VQ-VAE tokenizer

Images of {height}×{width} pixels and {channels} channel(s) to {spec.latent_size} of {spec.num_codes} tokens each, and back.

    import vqdeploy

    codec = vqdeploy.Codec.load("this folder")
    indices = codec.encode(images)           # uint8 or float in [0, 1] -> int64 (N, {spec.latent_size})
    probabilities = codec.decode(indices)    # float32 (N, {channels}, {height}, {width})

Without our package, `tokenizer.onnx` and `detokenizer.onnx` run in any onnxruntime; `manifest.json` names their inputs and
outputs. Check on your machine that what runs is what was trained: `python -m vqdeploy verify` and this folder's name.

| file | from | to |
|---|---|---|
| `tokenizer.onnx` | images | indices |
| `detokenizer.onnx` | indices | probabilities |
| `encoder.onnx` | images | latents |
| `quantizer.onnx` | latents | indices, quantized |
| `decoder.onnx` | quantized | logits, probabilities |
| `oracle.npz` | | the parameters, and a golden batch with the float64 oracle's answers |
| `manifest.json` | | sizes, names, digests, provenance, agreement |

## Training

Data: {data.get("source", "not recorded")}, {data.get("images", "?")} images, sha256 `{data.get("sha256", "not recorded")}`.
Recipe {provenance.get("recipe", "not recorded")}: {trained or "not recorded"}.
Checkpoint: sha256 `{provenance["checkpoint_sha256"]}`.

{_metrics(model.metrics)}

## These files

{_form(written)}

{_measured(measured)}

## Agreement with the float64 oracle

At export, on the golden batch, onnxruntime {provenance["onnxruntime"]} on its CPU provider:

```
{report}
```

A certified index is the only one that rounding allows; at a near tie, rounding may choose between codes that are equally near.
"""


def _form(written: Mapping[str, Any]) -> str:
    """How the graphs were written, in words."""
    words = [f"Networks in {written['precision']}, distances in float32, opset {written['opset']}."]
    if written["detokenizer"] == "table":
        words.append("`detokenizer.onnx` is a table of every image that tokens can mean, computed in float64.")
    if written["batch"]:
        words.append(f"Every graph takes batches of exactly {written['batch']}.")
    if written["symmetric_pads"]:
        words.append("Convolutions have symmetric pads and kernels with zeros before them.")
    if written["target"] == "cpu":
        words.append("They are written for onnxruntime's CPU provider; others run them, too.")
    return " ".join(words)


def _measured(measured: Mapping[str, Any]) -> str:
    tokens, lost = f"{measured['equal_tokens']:.4%} of the tokens equal", f"{measured['nats_lost']:+.4f} nats an image"
    return f"Beside the float64 oracle, on {measured['images']} images ({measured['of']}): {tokens}, {lost}."


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = [("last epoch of training", metrics), ("held-out images", metrics.get("held_out", {}))]
    names = ("bound", "reconstruction", "perplexity", "codes_used")
    found = [
        (label, row)
        for label, row in rows
        if isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in names)
    ]
    if not found:
        return "No metrics were recorded."
    lines = [
        f"| {label} | {row['bound']:.2f} | {row['reconstruction']:.2f} | {row['perplexity']:.1f} | {row['codes_used']} |"
        for label, row in found
    ]
    head = "| | bound, nats an image | reconstruction, nats | perplexity | codes used |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines)
