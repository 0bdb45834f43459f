"""Makes web pages that stand alone: single files that load nothing and open from a disk.

Every value from outside goes through ``text`` or ``embedded``. A security policy in the page
refuses all scripts except its own. Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqref.host.streams import plain

STYLE = Path(__file__).with_name("webpage.css")
"""The style of the pages, for light and dark."""


def text(value: object) -> str:
    """Returns a value as text of a page, whatever characters it has."""
    return html.escape(plain(str(value)))


def embedded(name: str, content: Any) -> str:
    """Returns plain data for the page's scripts, under an id.

    Numbers that are not finite become null.
    """
    words = json.dumps(_finite(content), separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{words}</script>'


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return content


def section(title: str, *parts: str) -> str:
    """Returns a part of a page with a heading. parts: markup."""
    return f"<section>\n<h2>{text(title)}</h2>\n{''.join(parts)}</section>\n"


def paragraph(words: object, kind: str = "") -> str:
    """Returns a paragraph. kind: a class of the style, or nothing."""
    return f'<p class="{kind}">{text(words)}</p>\n' if kind else f"<p>{text(words)}</p>\n"


def command(words: str) -> str:
    """Returns a command line that a reader can copy."""
    return f'<pre tabindex="0" role="group" aria-label="Command"><code>{text(words)}</code></pre>\n'


def facts(caption: str, known: Mapping[str, object]) -> str:
    """Returns a table of names and values. Values that are mappings are spelt out."""
    rows = "".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(spelt(value))}</td></tr>\n'
        for name, value in known.items()
    )
    head = f"<caption>{text(caption)}</caption>"
    return f'<table class="facts">{head}<tbody>\n{rows}</tbody></table>\n'


def spelt(value: object) -> str:
    """Returns a value as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {spelt(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(spelt, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def table(caption: str, head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    """Returns a table of figures. It scrolls sideways if it is too wide.

    rows: cells in markup, the first of which is a heading, and a class of the style, or nothing.
    """
    columns = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = "".join(
        (f'<tr class="{kind}">' if kind else "<tr>")
        + f'<th scope="row">{first}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>\n"
        for (first, *cells), kind in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}">'
        f"<table><caption>{text(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n"
        f"<tbody>\n{lines}</tbody></table></div>\n"
    )


CHECKED = (
    "stage",
    "wrong",
    "worst error",
    "bound",
    "share of the bound",
    "compared",
    "certified",
    "near ties",
    "flips",
    "precision",
)
"""The columns of the table of ``checks``."""


def checks(caption: str, report: Mapping[str, Any]) -> str:
    """Returns a table of what the judge found per stage, with the worst error beside its bound.

    report: what ``vqref.agreement.Report.to_dict`` returns.
    """
    rows = [(_check(check), "wrong" if check["violations"] else "") for check in report["checks"]]
    wrong = [check for check in report["checks"] if check["violations"]]
    said = "".join(paragraph(f"{check['stage']}: {check['problem']}", "wrong") for check in wrong)
    return table(caption, CHECKED, rows) + said


def part_of_bound(check: Mapping[str, Any]) -> float | None:
    """Returns the worst error as a share of its bound, or None if there is no such bound.

    The share is infinite if the error is not finite.
    """
    if not check["allowed"]:
        return None
    return math.inf if check["max_error"] is None else check["max_error"] / check["allowed"]


def _check(check: Mapping[str, Any]) -> list[str]:
    error, allowed, part = check["max_error"], check["allowed"], part_of_bound(check)
    counts = (check[name] for name in ("compared", "certified", "near_ties", "flips"))
    return [
        text(check["stage"]),
        _count(check["violations"]),
        "–" if error is None else f"{error:.1e}",
        "–" if allowed is None else f"{allowed:.1e}",
        "–" if part is None else share(part),
        *map(_count, counts),
        text(check["precision"]),
    ]


def share(part: float) -> str:
    """Returns a share, with a bar of the same length."""
    shown = min(part, 1.0) if math.isfinite(part) else 1.0
    return f'<span class="share" style="--part: {shown:.1%}">{percent(part)}</span>'


def percent(part: float) -> str:
    """Returns a share in words: "12 %", "0.4 %". A share above 0 never becomes 0."""
    if not math.isfinite(part):
        return "not finite"
    hundredths = 100 * part
    if hundredths >= 10 or hundredths == 0:
        return f"{hundredths:.0f} %"
    return f"{hundredths:.1f} %" if hundredths >= 0.1 else "below 0.1 %"


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def page(title: str, head: str, main: str, foot: str, scripts: Sequence[str] = ()) -> bytes:
    """Returns a whole page.

    head, main, foot: markup.
    scripts: JavaScript, run in this order at the end of the page.
    """
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    run = "".join(f"<script>{script}</script>\n" for script in scripts)
    whole = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
{head}</header>
<main>
{main}</main>
<footer>
{foot}</footer>
{run}</body>
</html>
"""
    return whole.encode("utf-8", "replace")  # a path may hold bytes that are no characters


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
