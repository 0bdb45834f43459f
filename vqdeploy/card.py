"""Writes the model card: a bundle's README.md, for a reader who has only the folder.

It begins with the metadata block that model hubs read. The block holds nothing that is guessed, so
it names no license.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

from vqdeploy.proof.advance import REFUTED_BY
from vqdeploy.stages import INDEX_TYPES
from vqref.agreement.advance import tell_proved
from vqref.agreement.report import Report
from vqref.preprocessing import CHANNELS, Preprocessing
from vqref.spec import ModelSpec

MEASURES = {
    "bound": ("bound, nats per image", ".2f"),
    "reconstruction": ("reconstruction, nats per image", ".2f"),
    "pixel_entropy": ("a perfect reconstruction, nats per image", ".2f"),
    "bits_per_dimension": ("bits per dimension", ".4f"),
    "nmse": ("NMSE", ".4f"),
    "psnr": ("PSNR of the mean error, dB", ".2f"),
    "mean_psnr": ("mean PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "perplexity": ("perplexity", ".1f"),
    "codes_used": ("codes used", "d"),
}
"""The measures that a card shows: their labels and number formats."""

IMAGE_SETS = {"held_out": "held-out images", "training_sample": "a sample of the training images"}
"""The images on which a model may have been measured after training."""


def write_card(spec: ModelSpec, manifest: Mapping[str, Any], report: Report) -> str:
    """Returns Markdown: what the model is, how to run it, how it was trained, measured and checked.

    manifest: the bundle's manifest without the entry for files. report: the agreement at export.
    """
    channels, height, width = spec.image_shape
    provenance = manifest["provenance"]
    return f"""---
library_name: onnx
pipeline_tag: image-feature-extraction
tags:
- image-tokenizer
- onnx
- vector-quantization
- vq-vae
---

# A VQ-VAE tokenizer

Turns images of {height}×{width} pixels and {channels} channel(s) into {_grid(spec)} tokens, and
back. Each token is one of {spec.num_codes}. Family {spec.family}, {spec.likelihood} likelihood.

    import vqdeploy

    codec = vqdeploy.Codec.load("this folder")
    indices = codec.encode(images)           # uint8, or in [0, 1]; int64 (N, {spec.latent_size})
    reconstructions = codec.decode(indices)  # float32 (N, {channels}, {height}, {width})
{_pictures(spec, manifest["preprocessing"])}

Without our package, `tokenizer.onnx` and `detokenizer.onnx` run in any onnxruntime; `manifest.json`
names their inputs and outputs. To check that your machine runs what was trained, run
`python -m vqdeploy verify` with the name of this folder.

| file | from | to |
|---|---|---|
| `tokenizer.onnx` | images | indices |
| `detokenizer.onnx` | indices | reconstructions |
| `encoder.onnx` | images | latents |
| `quantizer.onnx` | latents | indices, quantized |
| `decoder.onnx` | quantized | outputs, reconstructions |
| `oracle.npz` | | the parameters, and a golden batch with the float64 oracle's answers |
| `manifest.json` | | specification, names, digests, provenance, agreement |
{_prior(manifest)}
## Training

{_training(manifest)}

{_metrics(manifest["metrics"])}

## These files

{_form(manifest)}

{_measured(manifest["measured"])}

{_proved(manifest)}## Agreement with the float64 oracle

At export, on {manifest["agreement"]["images"]} images that the model draws, onnxruntime \
{provenance["onnxruntime"]} on its CPU provider:

```
{report}
```

Rounding cannot change a certified index. At a near tie, rounding may choose between codes that are
equally near.
"""


def _pictures(spec: ModelSpec, preprocessing: Mapping[str, Any]) -> str:
    """Returns the lines on pictures: how to encode them, and how they are prepared."""
    told = tell_pictures(Preprocessing.from_dict(preprocessing, spec.image_shape), spec.image_shape)
    if spec.image_shape[0] not in CHANNELS:
        return f"\n{told}"
    return f"""    indices = codec.encode(["a.png", "b.jpg"])  # paths or PIL images

{fill(told, 100)}
`python -m vqdeploy encode`, with the names of this folder and a folder of pictures, writes a file
of their tokens."""


def tell_pictures(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> str:
    """Returns a sentence on how pictures become images (C, H, W)."""
    channels, height, width = image_shape
    if channels not in CHANNELS:
        return f"It takes no pictures: they do not have {channels} channels."
    size = f"{height}×{width}"
    done = ["turned as their EXIF data say", f"made {CHANNELS[channels]}"]
    if channels < 4:
        done.append(f"laid on #{bytes(preprocessing.background).hex()} where transparent")
    if preprocessing.size is None:
        return f"Pictures of {size} pixels are {', '.join(done[:-1])} and {done[-1]}."
    done += ["cropped to the middle"] * preprocessing.crop
    how = "resized" if preprocessing.crop else "stretched"
    return f"Pictures are {', '.join(done)}, and {how} to {size} pixels."


def _grid(spec: ModelSpec) -> str:
    """Returns the number and layout of the tokens, such as "4" or "8×8 = 64"."""
    sides = "×".join(map(str, spec.latent_shape))
    return sides if len(spec.latent_shape) == 1 else f"{sides} = {spec.latent_size}"


def _training(manifest: Mapping[str, Any]) -> str:
    provenance, options = manifest["provenance"], manifest["training"]
    data = provenance.get("data", {})
    trained = ", ".join(f"{name} {value}" for name, value in options.items()) or "not recorded"
    file = "Content" if provenance["model_digest"] == "in memory" else "Model file"
    source = "not recorded"
    if data:
        counted = f"{data.get('source')}, {data.get('images', '?')} images"
        source = f"{counted}, sha256 `{data.get('sha256', 'not recorded')}`"
    imported = "".join(f"Imported from {told}.\n" for told in tell_imported(provenance))
    return f"""{imported}Data: {source}.
Recipe {provenance.get("recipe", "not recorded")}: {trained}.
{file}: sha256 `{provenance["model_sha256"]}`."""


def tell_imported(provenance: Mapping[str, Any]) -> list[str]:
    """Returns one phrase on the checkpoint that the model was imported from, or none."""
    found = provenance.get("imported")
    if not isinstance(found, dict):
        return []
    return [f"{found.get('file')} ({found.get('importer')}), sha256 {found.get('sha256')}"]


def _form(manifest: Mapping[str, Any]) -> str:
    """Returns sentences on how the graphs were written."""
    precision, opset = manifest["precision"], manifest["opset"]
    words = [f"Networks in {precision}, distances in float32, opset {opset}."]
    if manifest["detokenizer"] == "table":
        words.append("`detokenizer.onnx` is a table of every reconstruction, computed in float64.")
    if manifest["batch"]:
        words.append(f"Every graph takes batches of exactly {manifest['batch']}.")
    if (dtype := manifest["graphs"]["tokenizer"]["outputs"][0]["dtype"]) != INDEX_TYPES[0]:
        words.append(f"`indices` are {dtype} in the graphs.")
    if manifest["target"] == "cpu":
        words.append("They are written for onnxruntime's CPU provider; others run them too.")
    return " ".join(words)


def _measured(measured: Mapping[str, Any]) -> str:
    """Returns a sentence on what the graphs lose compared with the oracle."""
    lost = f"{measured['nats_lost']:+.4f} nats per image, {-measured['psnr_lost']:+.4f} dB of PSNR"
    return (
        f"Compared with the float64 oracle, on {measured['images']} images ({measured['of']}): "
        f"{measured['equal_tokens']:.4%} of the tokens equal, {lost}."
    )


def _prior(manifest: Mapping[str, Any]) -> str:
    """Returns the lines on a learned prior: its files and how to use it. "" if there is none."""
    if "prior" not in manifest:
        return ""
    kind, nats = manifest["prior"]["spec"]["kind"], manifest["prior"]["nats"]
    return f"""| `prior.onnx` | indices | log-probabilities of each, given those before |
| `prior_step.onnx` | one position | log-probabilities of the next |

The {kind} prior describes these tokens: held-out ones cost {nats:.1f} nats per image.
`codec.sample(16, seed=0)` draws images. With `certify=True` it also says which of them are the same
on every machine. `codec.log_likelihood(indices)` returns log p.
"""


def _proved(manifest: Mapping[str, Any]) -> str:
    """Returns the section on tokens that are proved in advance, "" if nothing was proved."""
    if "proved" not in manifest:
        return ""
    counts = manifest["proved"]
    told = fill(
        f"In advance, without running anything ({counts['of']}): {tell_proved(counts)}. What would "
        f"refute it: {REFUTED_BY}. `python -m vqdeploy prove` does the same for your images.",
        100,
    )
    return f"## What is proved for every machine\n\n{told}\n\n"


def _metrics(metrics: Mapping[str, Any]) -> str:
    """Returns a table of what was measured in the last epoch of training and after it."""
    columns = {"last epoch of training": metrics}
    columns |= {label: metrics[key] for key, label in IMAGE_SETS.items() if key in metrics}
    columns = {label: held for label, held in columns.items() if isinstance(held, dict)}
    rows = []
    for name, (label, form) in MEASURES.items():
        cells = [_cell(column.get(name), form) for column in columns.values()]
        if any(cells):
            rows.append(f"| {' | '.join([label, *cells])} |")
    if not rows:
        return "No metrics were recorded."
    head = f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
    return head + "\n".join(rows)


def _cell(value: Any, form: str) -> str:
    """Returns a number in a table's format, "" for a value that is not a number."""
    fits = isinstance(value, int if form == "d" else int | float) and not isinstance(value, bool)
    return format(value, form) if fits else ""
