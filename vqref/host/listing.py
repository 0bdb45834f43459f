"""Finds the files of a folder that are pictures, or that have other given endings."""

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
"""The endings of the names of pictures."""

MOST_NAMED = 5
"""The most things of a kind that a line names."""


@dataclass
class Listing:
    """What a folder holds.

    files: the files wanted, sorted: (path within the folder with "/" between the parts, path).
    subfolders: how many subfolders were not read.
    others: how many other files there are, by their endings.
    """

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
    """Lists the files of a folder whose names have one of the endings.

    Enters each folder once, and follows no link that stays within the top folder. So links cannot
    make a loop. Raises InputError if a folder cannot be listed.
    """
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
    """Returns what a folder holds, sorted by name. Raises InputError."""
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
    """Returns the count and the noun, in the plural unless the count is 1."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
