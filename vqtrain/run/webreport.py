"""Writes a run's ``report.html``: settings, curves, pictures, use of codes, checks, next commands.

The file is written anew after every epoch and at the end, from what the run has written so far. The
browser draws the curves with Bokeh's own JavaScript, which is part of the page.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vqref.host import webpage
from vqref.host.files import write_file
from vqtrain.run.folder import PICTURES, RunFolder

REPORT = "report.html"
"""The report's name in the folder of a run."""

DRAWING = Path(__file__).with_suffix(".js")
"""The script that draws the curves and shows another epoch's pictures."""

GOING_BYTES, PICTURE_BYTES = 2**20, 2**22
"""The most bytes of pictures in the report of an unfinished run, which is written often, and of an
ended run. The report of a long run shows pictures of only some epochs."""


class Measure(NamedTuple):
    """The name of a figure, and its format in Python and, as a curve, in the browser."""

    label: str
    form: str
    curve: str | None = None


CHECKED = "oracle_error_over_allowed"
"""The measure of a check against the oracle, not of images."""

MEASURES = {
    "bound": Measure("bound, nats per image", ",.2f", "0,0.00"),
    "reconstruction": Measure("reconstruction, nats per image", ",.2f"),
    "bits_per_dimension": Measure("bits per dimension", ".4f"),
    "nats": Measure("nats per image's tokens", ",.2f", "0,0.00"),
    "perplexity": Measure("perplexity", ",.1f", "0,0.0"),
    "codes_used": Measure("codes used", ",d"),
    "nmse": Measure("mean squared error / variance", ".4f", "0.0000"),
    "psnr": Measure("PSNR of the mean squared error, dB", ".2f", "0.00"),
    "mean_psnr": Measure("mean PSNR of the images, dB", ".2f", "0.00"),
    "ssim": Measure("SSIM", ".4f", "0.0000"),
    "commitment": Measure("commitment", ".4f"),
    "images_per_second": Measure("images per second", ",.0f"),
    "tokens_per_second": Measure("tokens per second", ",.0f"),
    CHECKED: Measure("worst error of a check, share of its bound", ".1%", "0%"),
}
"""What a report shows of the lines of ``metrics.jsonl``, if a run has it."""

KINDS = {
    "reconstructions": (
        "Reconstructions",
        "Rows of images, and beneath each row what the model makes of them",
    ),
    "samples": ("Samples", "Images that random tokens decode to"),
    "samples-1": ("Samples at temperature 1", "Images that the prior draws at temperature 1"),
    "samples-0.8": ("Samples at temperature 0.8", "Images that the prior draws at temperature 0.8"),
    "codebook": ("Codebook", "What each code decodes to, the most used first"),
}
"""The pictures of an epoch: their headings, and what they show."""


TABLES = {"run": "As the command was given", "training": "Training", "model": "Network"}
"""Captions of the tables of ``options.toml``."""


@dataclass(frozen=True)
class Story:
    """The content of a report besides the pictures.

    verdict: a sentence on how the run stands. good: whether that is good; None while the run goes
    on. history: the lines of ``metrics.jsonl``, with the measured images' figures under "measured".
    measured_as: what those images are. oracle, checked: the last check, from ``Report.to_dict``,
    and when it was made. settings: tables by their captions. following: the next commands by what
    they are for.
    """

    name: str
    verdict: str
    good: bool | None
    history: Sequence[Mapping[str, Any]]
    measured_as: str
    oracle: Mapping[str, Any] | None
    checked: str
    settings: Mapping[str, Mapping[str, Any]]
    following: Mapping[str, str]


def line_of(command: str, *words: object) -> str:
    """Returns a command line, with quotes around ``words`` if a shell needs them."""
    return " ".join([command, *(shlex.quote(str(word)) for word in words)])


def write_report(folder: RunFolder, story: Story, say: Callable[[str], None]) -> None:
    """Writes the report. If that fails, reports it in a line, and the run continues."""
    try:
        write_file(folder.path / REPORT, page_of(folder, story))
    except Exception as error:
        say(f"{REPORT} is not written: {type(error).__name__}: {error}")


def page_of(folder: RunFolder, story: Story) -> bytes:
    """Returns the page. Raises OSError, and ValueError for an invalid history."""
    lines = _lines(story)
    shown = _shown(folder, GOING_BYTES if story.good is None else PICTURE_BYTES)
    panels = _panels(story, lines)
    epochs = [line["epoch"] for line in story.history]
    data = {"epochs": epochs, "panels": panels, "shown": shown}
    main = [
        _figures(story, lines),
        _curves(panels),
        *([_pictures(shown)] if shown else []),
        *([_oracle(story)] if story.oracle else []),
        *([_next(story)] if story.following else []),
        _settings(folder, story),
    ]
    kind = {True: "verdict right", False: "verdict wrong", None: "verdict"}[story.good]
    head = f"<h1>{webpage.text(f'Training run {story.name}')}</h1>\n"
    head += webpage.paragraph(story.verdict, kind)
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
    foot = webpage.paragraph(f"Written by vqtrain on {now} UTC. The page loads nothing.")
    foot += webpage.embedded("data", data)
    return webpage.page(story.name, head, "".join(main), foot, _scripts())


@cache
def _scripts() -> tuple[str, ...]:
    """Returns our JavaScript and Bokeh's, without importing Bokeh's Python."""
    from bokeh.util.paths import bokehjs_path

    own = Path(bokehjs_path()) / "js"
    paths = (own / "bokeh.min.js", own / "bokeh-api.min.js", DRAWING)
    return tuple(path.read_text(encoding="utf-8") for path in paths)


def _lines(story: Story) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the figures of each epoch, by the set that they belong to."""
    found = {"training": list(story.history)}
    if all("measured" in line for line in story.history):
        found[story.measured_as] = [line["measured"] for line in story.history]
    return found


def _panels(story: Story, lines: Mapping[str, list[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the curves: per measure, one line for each set of images that has it."""
    found = []
    for name, measure in MEASURES.items():
        curves = [
            {
                "name": "check" if name == CHECKED else who,
                "kind": kind,
                "values": [line.get(name) for line in kept],
            }
            for kind, (who, kept) in enumerate(lines.items())
            if any(name in line for line in kept)
        ]
        if curves and measure.curve:
            panel = {"name": name, "label": measure.label, "format": measure.curve}
            found.append({**panel, "lines": curves})
    return found


def _figures(story: Story, lines: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """Returns the figures of the last and of every epoch, for readers who cannot hover."""
    names = [
        name for name in MEASURES if any(name in line for kept in lines.values() for line in kept)
    ]
    rows = [
        ([MEASURES[name].label, *(_cell(name, kept[-1]) for kept in lines.values())], "")
        for name in names
    ]
    last = story.history[-1]["epoch"]
    now = webpage.table(f"Figures after epoch {last}", ["measure", *lines], rows)
    head = [f"{MEASURES[name].label} ({who})" for name in names for who in lines]
    every = [
        (
            [str(line["epoch"])]
            + [_cell(name, kept[i]) for name in names for kept in lines.values()],
            "",
        )
        for i, line in enumerate(story.history)
    ]
    all_epochs = webpage.table("Figures of every epoch", ["epoch", *head], every)
    folded = f"<details><summary>Figures of every epoch</summary>\n{all_epochs}</details>\n"
    return webpage.section("Result", now, folded)


def _cell(name: str, line: Mapping[str, Any]) -> str:
    value = line.get(name)
    return "–" if value is None else format(value, MEASURES[name].form)


def _curves(panels: Sequence[Mapping[str, Any]]) -> str:
    """Returns a place for each curve, with its last figures in words."""
    parts = []
    for panel in panels:
        form = MEASURES[panel["name"]].form
        ends = [
            (f'<span class="curve-{line["kind"]}">{webpage.text(line["name"])}</span> ')
            + ("–" if line["values"][-1] is None else format(line["values"][-1], form))
            for line in panel["lines"]
        ]
        said = " · ".join(ends)
        label = webpage.text(panel["label"])
        parts.append(
            f'<figure class="curve"><figcaption><b>{label}</b>{said}</figcaption>'
            f'<div class="plot" id="curve-{panel["name"]}" role="img" '
            f'aria-label="Curve over the epochs: {label}. Its figures are in the table of every '
            'epoch."></div></figure>\n'
        )
    hint = webpage.paragraph(
        "Hover over a curve for the figures of an epoch. The table above has them, too.", "hint"
    )
    return webpage.section("Curves", hint, f'<div class="columns">\n{"".join(parts)}</div>\n')


def _shown(folder: RunFolder, most: int) -> list[dict[str, Any]]:
    """Returns the epochs that the report shows, with their pictures by kind and the use of codes.

    Takes as many as fit into ``most`` bytes, evenly spread, including the last epoch.
    """
    by_epoch: dict[int, dict[str, Path]] = {}
    for path in sorted((folder.path / PICTURES).glob("epoch-*-*.png")):
        _, epoch, kind = path.stem.split("-", 2)
        if kind in KINDS and epoch.isdecimal():
            by_epoch.setdefault(int(epoch), {})[kind] = path
    epochs, use = sorted(by_epoch), folder.read_use()
    size = sum(path.stat().st_size for kinds in by_epoch.values() for path in kinds.values())
    every = max(1, -(-size // most))
    return [
        {
            "epoch": epoch,
            "pictures": {kind: _address(by_epoch[epoch][kind]) for kind in by_epoch[epoch]},
            "use": _use(use.get(epoch)),
        }
        for epoch in epochs[::-1][::every][::-1]
    ]


def _use(use: dict[str, Any] | None) -> dict[str, Any] | None:
    """Returns an epoch's use of codes with its text; None if it was not kept."""
    if use is None:
        return None
    said = f"{use['used']:,} of {use['codes']:,} codes used, perplexity {use['perplexity']:,.1f}."
    return {**use, "told": said}


def _address(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _pictures(shown: Sequence[Mapping[str, Any]]) -> str:
    """Returns the pictures of the last epoch, a slider for the others, and the use of codes."""
    last = shown[-1]
    slider = (
        '<div class="slider" id="slider" hidden><label for="epoch">Epoch '
        f'<output for="epoch" id="epoch-shown">{last["epoch"]}</output></label>'
        f'<input type="range" id="epoch" min="0" max="{len(shown) - 1}" step="1" '
        f'value="{len(shown) - 1}" aria-valuetext="epoch {last["epoch"]}"></div>\n'
    )
    parts = []
    for kind in (kind for kind in KINDS if kind in last["pictures"]):
        title, alt = KINDS[kind]
        parts.append(
            f'<figure class="picture"><figcaption><b>{title}</b>{alt}.</figcaption>'
            f'<img id="picture-{kind}" src="{last["pictures"][kind]}" '
            f'data-alt="{alt}, after epoch {{epoch}}" alt="{alt}, after epoch {last["epoch"]}">'
            "</figure>\n"
        )
    if last["use"]:
        parts.append(
            '<figure class="picture"><figcaption><b>Use of codes</b>'
            f'<span id="use-told">{webpage.text(last["use"]["told"])}</span> Dashed: the share if '
            "all were used alike, and the perplexity.</figcaption>"
            '<div class="plot" id="use" role="img" aria-label="Curve: the share of all tokens '
            'that each code has, the most used code first."></div></figure>\n'
        )
    return webpage.section("Epoch by epoch", slider, *parts)


def _oracle(story: Story) -> str:
    """Returns what was checked, and the worst figure with its bound."""
    oracle = story.oracle or {}
    parts = {check["stage"]: webpage.part_of_bound(check) for check in oracle["checks"]}
    known = {stage: part for stage, part in parts.items() if part is not None}
    if oracle["passed"]:
        said = "The trainer agrees with the NumPy oracle"
        if known:
            worst = max(known, key=lambda stage: known[stage])
            part = webpage.percent(known[worst])
            said += f"; the worst figure, of {worst}, is {part} of its bound"
        told = webpage.paragraph(f"{said}.", "right")
    else:
        told = webpage.paragraph("The trainer disagrees with the NumPy oracle.", "wrong")
    return webpage.section("The oracle", told, webpage.checks(story.checked, oracle))


def _next(story: Story) -> str:
    hint = webpage.paragraph("In the folder in which the run was started:", "hint")
    parts = [
        webpage.paragraph(what) + webpage.command(words) for what, words in story.following.items()
    ]
    return webpage.section("What to run next", hint, *parts)


def _settings(folder: RunFolder, story: Story) -> str:
    known = {TABLES.get(name, name): found for name, found in folder.settings().items()}
    known |= story.settings
    tables = [webpage.facts(caption, found) for caption, found in known.items() if found]
    return webpage.section("Settings", f'<div class="columns">\n{"".join(tables)}</div>\n')
