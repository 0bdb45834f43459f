"""What each command does with its arguments; ``vqdeploy.__main__`` parses them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqref.commandline import ExitCode, InputError, MachineError, UsageError


@contextmanager
def _remarks() -> Iterator[None]:
    """Warnings as lines on stderr."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("default")
        yield
    for remark in remarks:
        print(f"vqdeploy: {remark.message}", file=sys.stderr)


def export(arguments: argparse.Namespace) -> int:
    from vqdeploy.export import PARAMETER_FORMATS, export
    from vqdeploy.graphs import GraphOptions
    from vqdeploy.tokens import read_images, require_format
    from vqref.spec import ModelSpec

    named = [getattr(arguments, name) for name in ("model", "from_params") if hasattr(arguments, name)]
    if len(named) != 1:
        raise UsageError("export needs either a model.pt or --from-params FILE")
    source = Path(named[0])
    if hasattr(arguments, "from_params"):
        require_format(source, PARAMETER_FORMATS)
    output: Path = getattr(arguments, "output", source.parent / f"{source.stem or 'model'}-onnx")
    try:
        options = GraphOptions(
            arguments.opset,
            arguments.precision,
            arguments.symmetric_pads,
            getattr(arguments, "static_batch", None),
            getattr(arguments, "fold", None),
            arguments.target,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None

    def images(spec: ModelSpec) -> Any:
        return read_images(arguments.data, spec)[0][: arguments.limit]

    report = export(
        source, output, options=options, images=images if hasattr(arguments, "data") else None, replace=arguments.replace
    )
    print(f"{report}\nwrote {output}; next: python -m vqdeploy verify {output}")
    return ExitCode.DONE


def verify(arguments: argparse.Namespace) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.certificate import CERTIFICATE, write_certificate
    from vqdeploy.verify import verify
    from vqref.files import require_writable
    from vqref.images import as_batch
    from vqref.pictures import load_any

    bundle = Bundle.open(arguments.bundle)
    certificate: Path | None = getattr(arguments, "certificate", bundle.path / CERTIFICATE if arguments.samples else None)
    if certificate:
        require_writable(certificate)
    images, compared = None, {"golden_batch": True, "images": 0, "latents": arguments.samples}
    if hasattr(arguments, "data"):
        data = load_any(arguments.data)
        images = as_batch(data.train[: arguments.limit], bundle.spec.image_shape)
        compared |= {"images": len(images), "images_sha256": data.sha256}
    with _remarks():
        report, device = verify(bundle, arguments.device, images, arguments.samples)
    if certificate:
        write_certificate(certificate, bundle, report, device, compared)
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "device": device, **report.to_dict()}, indent=2))
    else:
        also = [f"{compared[what]} {what}" for what in ("images", "latents") if compared[what]]
        print(f"{arguments.bundle} on {device}, {' and '.join(['golden batch', *also])}")
        print(report)
        print("verified: what runs is what was trained" if report.passed else "NOT verified: see the lines above")
        if certificate:
            print(f"wrote {certificate}")
    return ExitCode.DONE if report.passed else ExitCode.PARITY


def inspect(arguments: argparse.Namespace) -> int:
    from vqdeploy.bundle import FILES, Bundle

    bundle = Bundle.open(arguments.bundle)
    for name in FILES:
        bundle.read(name)
    manifest = bundle.manifest
    if arguments.json:
        print(json.dumps(manifest, indent=2))
        return ExitCode.DONE
    spec = bundle.spec
    print(f"{arguments.bundle}: every file has the size and sha256 of the manifest")
    print(f"model       images {spec.image_shape}, {spec.latent_size} of {spec.num_codes} tokens, codes of {spec.code_size}")
    form = f"{manifest['precision']}, opset {manifest['opset']}, batch {bundle.batch or 'free'}"
    print(f"graphs      {form}, detokenizer a {'table' if bundle.folded else 'network'}")
    for name, graph in manifest["graphs"].items():
        ways = [", ".join(f"{p['name']} {p['dtype']} {p['shape']}" for p in graph[way]) for way in ("inputs", "outputs")]
        print(f"  {name}\n    {ways[0]}\n    -> {ways[1]}")
    for name, entry in manifest["files"].items():
        print(f"  {name:<18}{entry['bytes']:>10} bytes  sha256 {entry['sha256'][:16]}…")
    provenance = manifest["provenance"]
    data = provenance.get("data") or {}
    print(f"trained on  {data.get('source', 'not recorded')}, recipe {provenance.get('recipe', 'not recorded')}")
    print(f"checkpoint  sha256 {provenance['checkpoint_sha256'][:16]}…")
    agreement, measured = manifest["agreement"], manifest.get("measured")
    worst = sum(check["violations"] for check in agreement["checks"])
    print(f"agreement   {worst} violations on {agreement['images']} images, {agreement['provider']}")
    if measured:
        share = f"{measured['equal_tokens']:.4%} of the tokens equal, {measured['nats_lost']:+.4f} nats an image"
        print(f"measured    {share}, {measured['images']} images")
    return ExitCode.DONE


def bench(arguments: argparse.Namespace) -> int:
    from vqdeploy.bench import bench

    with _remarks():
        found = bench(arguments.bundle, arguments.device, arguments.batch or [1, 16, 256], arguments.seconds)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return ExitCode.DONE
    print(f"{arguments.bundle} on {found['device']}: {', '.join(found['providers'])}")
    print("            batch          p50 ms    p99 ms    images/s    tokens/s   calls")
    for row in found["rows"]:
        print(
            f"{row['direction']:<12}{row['batch']:>5}  {row['implementation']:<6}{row['p50_ms']:>8.3f}{row['p99_ms']:>10.3f}"
            f"{row['images_per_second']:>12.0f}{row['tokens_per_second']:>12.0f}{row['calls']:>8}"
        )
    return ExitCode.DONE


def encode(arguments: argparse.Namespace) -> int:
    from vqdeploy.tokens import TOKEN_FORMATS, read_images, require_format, write_indices

    require_format(arguments.output, TOKEN_FORMATS)
    with _codec(arguments, arguments.output) as codec:
        images, names = read_images(arguments.images, codec.spec)
        indices = codec.encode(images)
        write_indices(arguments.output, indices, names)
        used = len(set(indices.ravel().tolist()))
        print(f"{len(images)} images on {codec.device}: {indices.size} tokens, {used} different; wrote {arguments.output}")
    return ExitCode.DONE


def decode(arguments: argparse.Namespace) -> int:
    from vqdeploy.tokens import read_indices, require_format, write_probabilities

    require_format(arguments.output, (".npz", ".npy", ".png"))
    with _codec(arguments, arguments.output) as codec:
        indices = read_indices(arguments.tokens)
        try:
            probabilities = codec.decode(indices)
        except ValueError as error:
            raise InputError(f"{arguments.tokens}: {error}") from None
        if arguments.output.suffix == ".png":
            _save_square(arguments.output, probabilities)
        else:
            write_probabilities(arguments.output, probabilities)
        print(f"{len(indices)} images on {codec.device}; wrote {arguments.output}")
    return ExitCode.DONE


def reconstruct(arguments: argparse.Namespace) -> int:
    from vqdeploy.tokens import read_images, require_format
    from vqref.pictures import save_pairs

    require_format(arguments.output, (".png", ".PNG"))
    with _codec(arguments, arguments.output) as codec:
        images, _ = read_images(arguments.images, codec.spec)
        images = images[: arguments.limit]
        if not len(images):
            raise InputError(f"{arguments.images}: holds no images")
        save_pairs(arguments.output, images, codec.reconstruct(images))
        print(f"{len(images)} images on {codec.device}, each above its reconstruction; wrote {arguments.output}")
    return ExitCode.DONE


def sample(arguments: argparse.Namespace) -> int:
    import numpy as np

    from vqdeploy.tokens import require_format

    require_format(arguments.output, (".png", ".PNG"))
    with _codec(arguments, arguments.output) as codec:
        _save_square(arguments.output, codec.sample(arguments.number, rng=np.random.default_rng(arguments.seed)))
        print(f"{arguments.number} samples of the uniform prior on {codec.device}; wrote {arguments.output}")
    return ExitCode.DONE


def doctor(arguments: argparse.Namespace) -> int:
    from vqdeploy.doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(_wrapped("ok  " if finding.fine else "BAD ", f"{finding.what}: {finding.found}"))
            if finding.advice:
                print(_wrapped("    ", finding.advice))
    if broken := [finding.what for finding in findings if finding.fatal]:
        raise MachineError(f"no bundle can run here: {', '.join(broken)}")
    return ExitCode.DONE


def _wrapped(before: str, text: str) -> str:
    """Within 80 columns, later lines indented."""
    return textwrap.fill(before + text, 80, subsequent_indent=" " * 6, break_on_hyphens=False)


@contextmanager
def _codec(arguments: argparse.Namespace, output: Path) -> Iterator[Any]:
    """The bundle's Codec, once it is known that the output can be written."""
    from vqdeploy.codec import Codec
    from vqref.files import require_writable

    require_writable(output)
    with _remarks():
        codec = Codec.load(arguments.bundle, arguments.device)
    with codec:
        yield codec


def _save_square(path: Path, images: Any) -> None:
    from vqref.pictures import save_square

    if not len(images):
        raise InputError(f"{path}: no images to draw")
    save_square(path, images)
