"""Which files of a folder are pictures, or of other endings."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vqref.errors import InputError
from vqref.host.files import is_folder
from vqref.host.streams import plain

ENDINGS = (
    ".apng", ".bmp", ".gif", ".icb", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif",
    ".tiff", ".vda", ".vst", ".webp",
)  # fmt: skip
"""What the names of pictures end in."""

MOST_NAMED = 5
"""How many things of a kind a line names."""


@dataclass
class Listing:
    """What a folder holds: the files that were looked for, (path within it with "/" between the
    parts, path), sorted; how many subfolders that are not read; how many other files, by their
    endings."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    subfolders: int = 0
    others: Counter[str] = field(default_factory=Counter)

    def said(self) -> list[str]:
        lines = []
        if self.others:
            kinds = [plain(kind) for kind, _ in self.others.most_common(MOST_NAMED)]
            more = ", ..." if len(self.others) > MOST_NAMED else ""
            count = many(self.others.total(), "other file")
            lines.append(f"{count} left out ({', '.join(kinds)}{more})")
        if self.subfolders:
            lines.append(f"{many(self.subfolders, 'subfolder')} left out without --recursive")
        return lines


def list_folder(folder: Path, recursive: bool, endings: tuple[str, ...] = ENDINGS) -> Listing:
    """Lists the files of a folder whose names end so. Each folder is entered once, and none by a
    link that stays within the whole, so that links cannot make a loop. Raises InputError for a
    folder that cannot be listed."""
    found, top = Listing(), os.path.realpath(folder)
    entered, waiting = {top}, [("", folder)]
    while waiting:
        within, place = waiting.pop()
        for entry in _entries(place):
            name, path = within + entry.name, place / entry.name
            if entry.name.startswith("."):
                found.others["hidden"] += 1
            elif not _leads_to_folder(entry):
                if path.name.lower().endswith(endings):
                    found.files.append((name, path))
                else:
                    found.others[path.suffix.lower() or "no ending"] += 1
            elif not recursive:
                found.subfolders += 1
            else:
                real = os.path.realpath(path)
                inside = entry.is_symlink() and Path(real).is_relative_to(top)
                if real not in entered and not inside:
                    entered.add(real)
                    waiting.append((f"{name}/", path))
    found.files.sort(key=lambda one: one[0].split("/"))
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted by name. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}") from None


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink():
        return is_folder(Path(entry.path))
    return entry.is_dir(follow_symlinks=False)


def many(count: int, what: str) -> str:
    """The count and what is counted, in the plural unless it is one."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
