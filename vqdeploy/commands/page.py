"""``vqdeploy page``: writes a static site that runs a bundle in a browser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqref.errors import ExitCode
from vqref.host.commandline import Command, option


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Which bundle to run, and where to write the page."""

    bundle: Path = option(type=Path, help="the folder that export wrote")
    output: Path = option(
        "--output", default=Path("page"), type=Path, metavar="FOLDER", help="folder to write"
    )
    runtime: Path | None = option(
        "--runtime",
        default=None,
        type=Path,
        metavar="FOLDER",
        help="the npm package onnxruntime-web, or its dist folder (default: npm fetches it)",
    )
    replace: bool = option(
        "--replace", default=False, action="store_true", help="replace the page if there is one"
    )


def run(options: PageOptions) -> int:
    from vqdeploy.bundle import Bundle
    from vqdeploy.site import write_page

    bundle, output = Bundle.open(options.bundle), options.output
    size = write_page(bundle, output, options.runtime, replace=options.replace)
    print(f"wrote {output}, {size / 2**20:.1f} MiB, for any web server; to look at it here:")
    print(f"python -m http.server --bind localhost --directory {output}")
    return ExitCode.DONE


COMMAND = Command("page", "write a static site that runs a bundle in a browser", PageOptions, run)
