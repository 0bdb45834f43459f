"""What the site shows beside the files of ``docs/``: README.md as its home, benchmarks/README.md,
and a page for each source file that a page links to.

Documents link to each other as files of the repository, so that they can be read there, too. Here
every such link becomes one of the site, and one that leads nowhere stops ``mkdocs build --strict``.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
MOVED = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md"}
"""Documents outside of ``docs/``, and what their pages are called."""

LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```)$", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".js": "javascript"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the documents from elsewhere, and what any document links to outside of ``docs/``."""
    for path, name in MOVED.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    for path in sorted(_linked(files)):
        files.append(_shown(config, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with every link to a file of the repository as one of the site."""
    origin, here = _origin(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        target = _page_of(_resolved(origin, link[2]))
        return f"{link[1]}{posixpath.relpath(target, here or '.')}{link[3] or ''}{link[4]}"

    return "".join(
        part if part.startswith("```") else LINK.sub(moved, part) for part in FENCE.split(markdown)
    )


def _linked(files: Files) -> set[str]:
    """Files outside of ``docs/`` to which documents link."""
    found = set()
    for file in files.documentation_pages():
        origin = _origin(file.src_uri)
        text = FENCE.sub("", (ROOT / origin).read_text())
        found |= {_resolved(origin, link[2]) for link in LINK.finditer(text)}
    outside = {path for path in found if not path.startswith("docs/") and path not in MOVED}
    return {path for path in outside if (ROOT / path).exists()}


def _origin(name: str) -> str:
    """The path in the repository of a page."""
    return next((path for path, moved in MOVED.items() if moved == name), f"docs/{name}")


def _resolved(origin: str, target: str) -> str:
    """The path in the repository to which a document links."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))


def _page_of(path: str) -> str:
    """What the site calls a file of the repository; a link to a lost file stays wrong."""
    if path in MOVED:
        return MOVED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(".png") else f"source/{path}.md"


def _shown(config: MkDocsConfig, path: str) -> File:
    """A picture as it is, any other file as a page with its text, a folder as a list of names."""
    source = ROOT / path
    if source.suffix == ".png":
        return File.generated(config, path, abs_src_path=str(source))
    language = LANGUAGES.get(source.suffix, "text")
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n"
    names = "\n".join(sorted(each.name for each in source.iterdir())) if source.is_dir() else None
    content = f"{head}````{language}\n{names or source.read_text()}\n````\n"
    return File.generated(config, f"source/{path}.md", content=content)
