"""``vqdeploy doctor``: says whether this machine can run bundles, and what to do if it cannot."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vqdeploy.runtime.library import onnxruntime
from vqdeploy.runtime.sessions import cuda_devices
from vqref.errors import ExitCode, MachineError
from vqref.host.commandline import Command, option
from vqref.host.machine import describe_machine

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

PACKAGES = (
    "portable-vqvae",
    "numpy",
    *RUNTIMES,
    "onnx",
    "torch",
    "pillow",
    "pyarrow",
    "safetensors",
)

LIBRARIES = {
    "CUDA runtime": ("libcudart.so.13", "libcudart.so.12"),
    "cuDNN": ("libcudnn.so.9",),
    "cuBLAS": ("libcublas.so.13", "libcublas.so.12"),
}
"""Shared libraries that onnxruntime's CUDA provider loads. One name per library is enough."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """How to print the findings."""

    json: bool = option("--json", default=False, action="store_true", help="print JSON")


def run(options: DoctorOptions) -> int:
    findings = examine()
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            _tell(finding)
    if broken := [finding.what for finding in findings if finding.fatal]:
        raise MachineError(f"no bundle can run here: {', '.join(broken)}")
    return ExitCode.DONE


@dataclass(frozen=True)
class Finding:
    """One finding: what was checked, the result, whether it is fine, and what to do if not.

    fatal: no bundle runs until the advice is followed.
    """

    what: str
    found: str
    fine: bool
    advice: str = ""
    fatal: bool = False


def _tell(finding: Finding) -> None:
    """Prints a finding and its advice within 80 columns."""
    found = f"{finding.what}: {finding.found}"
    for before, text in (("ok  " if finding.fine else "BAD ", found), ("    ", finding.advice)):
        if text:
            line = before + text
            print(textwrap.fill(line, 80, subsequent_indent=" " * 6, break_on_hyphens=False))


def examine() -> list[Finding]:
    """Returns all findings, in an order where each check needs only those before it."""
    findings = [*_machine(), _one_runtime()]
    try:
        ort = onnxruntime()
    except ImportError as error:
        advice = "pip install onnxruntime-gpu"
        return [*findings, Finding("import onnxruntime", str(error), False, advice, fatal=True)]
    providers, cards = ort.get_available_providers(), cuda_devices()
    has_provider = "CUDAExecutionProvider" in providers
    advice = "for CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    findings += [
        Finding("providers", ", ".join(providers), True, "" if has_provider else advice),
        Finding(
            "NVIDIA driver",
            f"{cards} CUDA device(s)",
            True,
            "" if cards else "none: bundles run on the CPU",
        ),
    ]
    return findings + (_libraries(ort) if has_provider and cards else [])


def _machine() -> list[Finding]:
    """Returns the processor, system and packages. These are always fine."""
    machine = describe_machine(PACKAGES)
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"
    packages = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if name in machine)
    return [
        Finding("machine", f"{hardware}, Python {machine['python']}", True),
        Finding("packages", packages, True),
    ]


def _one_runtime() -> Finding:
    """Checks that exactly one of the packages that provide onnxruntime is installed."""
    found = []
    for name in RUNTIMES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) == 1:
        return Finding("onnxruntime", found[0], True)
    if not found:
        return Finding(
            "onnxruntime",
            "not installed",
            False,
            "pip install onnxruntime-gpu (or onnxruntime)",
            fatal=True,
        )
    advice = (
        "they overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one"
    )
    return Finding("onnxruntime", " and ".join(found), False, advice, fatal=True)


def _libraries(ort: Any) -> list[Finding]:
    """Checks that the CUDA libraries can be loaded."""
    ort.preload_dlls()
    findings = []
    for what, names in LIBRARIES.items() if sys.platform == "linux" else ():
        found = next((name for name in names if _loads(name)), None)
        advice = "" if found else "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        findings.append(Finding(what, found or "not found", found is not None, advice))
    return findings


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


COMMAND = Command(
    "doctor", "check this machine, and say how to get what it lacks", DoctorOptions, run
)
