"""The machine and the versions that a figure was measured on: every benchmark prints it first."""

from __future__ import annotations

from datetime import UTC, datetime

from vqref.machine import describe_machine

PACKAGES = ("numpy", "torch", "onnxruntime-gpu", "onnxruntime")


def describe() -> str:
    """One line: date, processor, cores, and the versions of the packages that compute."""
    machine = describe_machine(PACKAGES)
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES) if name in machine)
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine['processor']}, {machine['cores']} cores, {versions}"
