"""``vqdeploy inspect``: says what a bundle holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from vqref.errors import ExitCode
from vqref.host.commandline import Command, option
from vqref.host.streams import plain

if TYPE_CHECKING:
    from vqdeploy.bundle import Bundle


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """The bundle to look at."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    json: bool = option("--json", default=False, action="store_true", help="print the manifest")


def run(options: InspectOptions) -> int:
    from vqdeploy.bundle import Bundle

    bundle = Bundle.open(options.bundle)
    for name in bundle.manifest["files"]:
        bundle.read(name)
    if options.json:
        print(json.dumps(bundle.manifest, indent=2))
        return ExitCode.DONE
    print(f"{options.bundle}: every file has the size and sha256 of the manifest")
    print(f"manifest    {bundle.sha256}")
    for part in (_model(bundle), _files(bundle.manifest), _proof(bundle.manifest), _proved(bundle)):
        for line in part:
            print(plain(line))  # a file may hold control codes of terminals
    return ExitCode.DONE


def _model(bundle: Bundle) -> list[str]:
    """Returns lines on the networks, the preparation of pictures, and the form of the graphs."""
    from vqdeploy.card import tell_pictures

    spec, manifest = bundle.spec, bundle.manifest
    tokens = f"{spec.latent_shape} tokens of {spec.num_codes} kinds, codes of {spec.code_size}"
    prepared = tell_pictures(bundle.preprocessing, spec.image_shape).removeprefix("Pictures ")
    form = f"{manifest['precision']}, opset {manifest['opset']}, batch {bundle.batch or 'free'}"
    return [
        f"model       {spec.family}: images {spec.image_shape}, {spec.likelihood} likelihood",
        f"            {tokens}",
        *wrap(f"pictures    {prepared}", 79, subsequent_indent=" " * 12),
        f"graphs      {form}, detokenizer a {'table' if bundle.folded else 'network'}",
        *_prior(bundle),
    ]


def _prior(bundle: Bundle) -> list[str]:
    """Returns a line on the learned prior and on what tokens cost under it, if there is one."""
    if bundle.prior is None:
        return []
    nats, rows = bundle.manifest["prior"]["nats"], len(bundle.prior.rows)
    return [f"prior       {bundle.prior.kind}, {rows} rows; held-out tokens cost {nats:.2f} nats"]


def _files(manifest: Mapping[str, Any]) -> list[str]:
    """Returns lines on the inputs and outputs of graphs, and on every file's size and digest."""
    lines = []
    for name, graph in manifest["graphs"].items():
        lines.append(f"  {name}")
        for before, ports in (("    ", graph["inputs"]), ("    -> ", graph["outputs"])):
            lines += [f"{before}{port['name']} {port['dtype']} {port['shape']}" for port in ports]
    for name, entry in manifest["files"].items():
        lines.append(f"  {name:<18}{entry['bytes']:>10} bytes  sha256 {entry['sha256'][:16]}…")
    return lines


def _proof(manifest: Mapping[str, Any]) -> list[str]:
    """Returns lines on where the model came from and how its graphs agreed with the oracle."""
    from vqdeploy.card import tell_imported

    provenance, agreement = manifest["provenance"], manifest["agreement"]
    data = provenance.get("data")
    source = data.get("source", "not recorded") if isinstance(data, dict) else "not recorded"
    wrong = sum(check["violations"] for check in agreement["checks"])
    measured = manifest["measured"]
    lost = f"{measured['nats_lost']:+.4f} nats per image, {-measured['psnr_lost']:+.4f} dB"
    return [
        *(f"imported    from {told}" for told in tell_imported(provenance)),
        f"trained on  {source}, recipe {provenance.get('recipe', 'not recorded')}",
        f"model file  {_origin(provenance)}",
        f"agreement   {wrong} violations on {agreement['images']} images, {agreement['provider']}",
        f"measured    {measured['equal_tokens']:.4%} of the tokens of {measured['images']} images "
        "equal,",
        f"            {lost}",
        *_in_advance(manifest),
    ]


def _in_advance(told: Mapping[str, Any]) -> list[str]:
    """Returns how many tokens are proved in advance, if the manifest or certificate says so."""
    from vqref.agreement.advance import tell_proved

    if not told.get("proved"):
        return []
    text = f"proved      {tell_proved(told['proved'])} ({told['proved']['of']})"
    return wrap(text, 79, subsequent_indent=" " * 12)


def _origin(provenance: Mapping[str, Any]) -> str:
    sha256, digest = f"sha256 {provenance['model_sha256'][:16]}…", provenance["model_digest"]
    if digest == "in memory":
        return f"none, exported from memory; {sha256} of its content"
    return f"{sha256}, its own digest {digest}"


def _proved(bundle: Bundle) -> list[str]:
    """Returns what the certificate in the bundle says, if there is one. Raises InputError."""
    from vqdeploy.proof.certificate import CERTIFICATE, read_certificate

    if not (bundle.path / CERTIFICATE).exists():
        return []
    found = read_certificate(bundle.path / CERTIFICATE)
    of = "this manifest" if found["manifest_sha256"] == bundle.sha256 else "ANOTHER manifest"
    said = f"certificate {found['verdict']} on {found['date']}, of {of}"
    return [said, *_in_advance(found)]


COMMAND = Command(
    "inspect", "check the digests of a bundle and say what it holds", InspectOptions, run
)
