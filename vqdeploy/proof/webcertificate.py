"""Writes a certificate as a web page: one file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqdeploy.bundle import MANIFEST, Bundle
from vqref.agreement.advance import tell_proved
from vqref.host import webpage
from vqref.host.files import write_file

FIGURES = (
    "Each stage runs on inputs that the float64 oracle made, and each figure stands beside its "
    "bound. Rounding cannot change a certified index, so it must be equal. At a near tie, rounding "
    "may choose another code; such a flip is allowed. A value beyond its bound, or a certified "
    "index that differs, is wrong."
)


def write_page(path: Path, bundle: Bundle, content: Mapping[str, Any]) -> None:
    """Writes the page of a certificate. Raises OSError.

    content: what ``vqdeploy.proof.certificate.certify`` returned for ``bundle``.
    """
    write_file(path, page_of(bundle, content))


def page_of(bundle: Bundle, content: Mapping[str, Any]) -> bytes:
    """Returns the page: the verdict first, then what it is based on."""
    name, report = bundle.path.resolve().name, content["report"]
    head = f"<h1>{webpage.text(f'Certificate of {name}')}</h1>\n" + _verdict(content)
    parts = [
        webpage.section(
            "What was compared",
            webpage.facts("Images, latents and graphs", _compared(bundle, content)),
        ),
        webpage.section(
            "What was found",
            webpage.paragraph(FIGURES, "hint"),
            webpage.checks("The bundle's stages beside the oracle's", report),
        ),
        *([_in_advance(content["proved"])] if content["proved"] else []),
        webpage.section("The machine", _machine(content)),
        webpage.section("Digests", _digests(bundle, content)),
        webpage.section(
            "What would refute it", webpage.paragraph(_sentence(content["refuted_by"]))
        ),
    ]
    foot = webpage.paragraph("Written by vqdeploy verify. The page loads nothing.")
    foot += webpage.paragraph(
        "It is a copy to read. To check it, run the command again: python -m vqdeploy verify."
    )
    return webpage.page(f"Certificate of {name}", head, "".join(parts), foot)


def _verdict(content: Mapping[str, Any]) -> str:
    wrong = [check for check in content["report"]["checks"] if check["violations"]]
    if content["verdict"] == "verified":
        told = webpage.paragraph("Verified: what runs is what was trained.", "verdict right")
    else:
        stages = ", ".join(check["stage"] for check in wrong)
        told = webpage.paragraph(f"NOT verified: {stages} is wrong.", "verdict wrong")
    count, date = len(content["report"]["checks"]), content["date"]
    when = date.replace("T", " ").replace("+00:00", " UTC")
    passed = f"{count - len(wrong)} of {count} checks passed on {content['device']}, {when}."
    bundle = webpage.text(content["manifest_sha256"])
    return (
        told
        + webpage.paragraph(passed)
        + f'<p class="hint">Bundle: manifest sha256 <code>{bundle}</code></p>\n'
    )


def _compared(bundle: Bundle, content: Mapping[str, Any]) -> dict[str, object]:
    """Returns the facts on what was compared."""
    compared, report = content["compared"], content["report"]
    given, latents = compared.get("images"), compared.get("latents")
    also = f", and {given:,} given images" if given else ""
    return {
        "images": f"{report['images']:,}: the golden batch, images aimed at every code{also}",
        **({"latents": f"{latents:,} more, fed to the quantizer"} if latents else {}),
        "codes": f"{report['codes']} of {bundle.spec.num_codes} are tokens of these images",
        "graphs": content["precision"]["graphs"],
        "distances": content["precision"]["distances"],
    }


def _in_advance(proved: Mapping[str, Any]) -> str:
    told = webpage.paragraph(f"On {proved['of']}: {tell_proved(proved)}.")
    refuted = webpage.paragraph(f"What would refute it: {proved['refuted_by']}.")
    return webpage.section("Proved in advance, for every machine", told, refuted)


def _machine(content: Mapping[str, Any]) -> str:
    """Returns the machine, and how many nodes of each graph each provider ran."""
    known = {
        **content["machine"],
        "device": content["device"],
        "TF32": content["precision"]["tf32"],
    }
    rows = [
        ([webpage.text(stage), webpage.text(provider), f"{sum(nodes.values()):,}"], "")
        for stage, providers in content["placement"].items()
        for provider, nodes in providers.items()
    ]
    placed = "Which provider of onnxruntime ran each graph's nodes"
    head = ["graph", "provider", "nodes"]
    return webpage.facts("Machine and versions", known) + webpage.table(placed, head, rows)


def _digests(bundle: Bundle, content: Mapping[str, Any]) -> str:
    files = {MANIFEST: content["manifest_sha256"]}
    files |= {name: entry["sha256"] for name, entry in bundle.manifest["files"].items()}
    if digest := content["compared"].get("images_sha256"):
        files["the given images"] = digest
    return webpage.facts("sha256 of what was verified", files)


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
