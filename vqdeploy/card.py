"""The model card: a bundle's README.md, for whoever is handed the folder.

It begins with the metadata block that model hubs read; nothing in it is guessed, a license least of
all.
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
"""The measures that a card shows: how they are called and written."""

IMAGE_SETS = {"held_out": "held-out images", "training_sample": "a sample of the training images"}
"""What a model's metrics may have been measured on after training."""


def write_card(spec: ModelSpec, manifest: Mapping[str, Any], report: Report) -> str:
    """Markdown: what the model is, how to run it, how it was trained and measured, and the proof.

    manifest: everything that the bundle's manifest says, but for its files. report: the agreement
    at export.
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

Images of {height}×{width} pixels and {channels} channel(s) to {_grid(spec)} tokens, and back.
Each token is one of {spec.num_codes}. Family {spec.family}, {spec.likelihood} likelihood.

    import vqdeploy

    codec = vqdeploy.Codec.load("this folder")
    indices = codec.encode(images)           # uint8 or in [0, 1] to int64 (N, {spec.latent_size})
    reconstructions = codec.decode(indices)  # float32 (N, {channels}, {height}, {width})
{_pictures(spec, manifest["preprocessing"])}

Without our package, `tokenizer.onnx` and `detokenizer.onnx` run in any onnxruntime; `manifest.json`
names their inputs and outputs. Check on your machine that what runs is what was trained:
`python -m vqdeploy verify` and this folder's name.

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

A certified index is the only one that rounding allows; at a near tie, rounding may choose between
codes that are equally near.
"""


def _pictures(spec: ModelSpec, preprocessing: Mapping[str, Any]) -> str:
    """How pictures are encoded, if the model takes any: the end of the code, and what is done."""
    told = tell_pictures(Preprocessing.from_dict(preprocessing, spec.image_shape), spec.image_shape)
    if spec.image_shape[0] not in CHANNELS:
        return f"\n{told}"
    return f"""    indices = codec.encode(["a.png", "b.jpg"])  # paths or PIL images

{fill(told, 100)}
`python -m vqdeploy encode` and the names of two folders, this and one of pictures, makes a file of
their tokens."""


def tell_pictures(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> str:
    """What is done to pictures for images (C, H, W), in a sentence."""
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
    """How many tokens, and how they lie: 4; 8×8 = 64."""
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
    """Whose checkpoint a model was imported from, if it was: one phrase, or none."""
    found = provenance.get("imported")
    if not isinstance(found, dict):
        return []
    return [f"{found.get('file')} ({found.get('importer')}), sha256 {found.get('sha256')}"]


def _form(manifest: Mapping[str, Any]) -> str:
    """How the graphs were written, in words."""
    precision, opset = manifest["precision"], manifest["opset"]
    words = [f"Networks in {precision}, distances in float32, opset {opset}."]
    if manifest["detokenizer"] == "table":
        words.append("`detokenizer.onnx` is a table of every reconstruction, computed in float64.")
    if manifest["batch"]:
        words.append(f"Every graph takes batches of exactly {manifest['batch']}.")
    if (dtype := manifest["graphs"]["tokenizer"]["outputs"][0]["dtype"]) != INDEX_TYPES[0]:
        words.append(f"`indices` are {dtype} in the graphs.")
    if manifest["target"] == "cpu":
        words.append("They are written for onnxruntime's CPU provider; others run them, too.")
    return " ".join(words)


def _measured(measured: Mapping[str, Any]) -> str:
    """What the graphs lose beside the oracle, in a sentence."""
    lost = f"{measured['nats_lost']:+.4f} nats per image, {-measured['psnr_lost']:+.4f} dB of PSNR"
    return (
        f"Beside the float64 oracle, on {measured['images']} images ({measured['of']}): "
        f"{measured['equal_tokens']:.4%} of the tokens equal, {lost}."
    )


def _prior(manifest: Mapping[str, Any]) -> str:
    """The files of a learned prior, and how to draw from it, if there is one."""
    if "prior" not in manifest:
        return ""
    kind, nats = manifest["prior"]["spec"]["kind"], manifest["prior"]["nats"]
    return f"""| `prior.onnx` | indices | log-probabilities of each, given those before |
| `prior_step.onnx` | one position | log-probabilities of the next |

The {kind} prior is of these tokens: held-out ones cost {nats:.1f} nats an image. `codec.sample(16,
seed=0)` draws images, the same on every machine where `certify=True` says so, and
`codec.log_likelihood(indices)` is log p.
"""


def _proved(manifest: Mapping[str, Any]) -> str:
    """A section on the tokens that are proved in advance, if that was asked."""
    if "proved" not in manifest:
        return ""
    counts = manifest["proved"]
    told = fill(
        f"In advance, without running anything ({counts['of']}): {tell_proved(counts)}. What would "
        f"refute it: {REFUTED_BY}. `python -m vqdeploy prove` says it of your images.",
        100,
    )
    return f"## What is proved of every machine\n\n{told}\n\n"


def _metrics(metrics: Mapping[str, Any]) -> str:
    """A table of what was measured in training's last epoch and after it."""
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
    """A number as a table shows it; nothing for what is none."""
    fits = isinstance(value, int if form == "d" else int | float) and not isinstance(value, bool)
    return format(value, form) if fits else ""
