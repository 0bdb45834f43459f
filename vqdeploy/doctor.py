"""Whether this machine can run bundles, on what, and what to do about what is missing."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vqdeploy.sessions import cuda_devices
from vqref.machine import describe_machine

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

PACKAGES = ("portable-vqvae", "numpy", *RUNTIMES, "onnx", "torch", "pillow", "pyarrow", "safetensors")

LIBRARIES = {
    "CUDA runtime": ("libcudart.so.13", "libcudart.so.12"),
    "cuDNN": ("libcudnn.so.9",),
    "cuBLAS": ("libcublas.so.13", "libcublas.so.12"),
}
"""Shared libraries that onnxruntime's CUDA provider loads, any one of each."""


@dataclass(frozen=True)
class Finding:
    """what was looked at, what was found, whether that is fine, and what to do where it is not. fatal: no bundle runs."""

    what: str
    found: str
    fine: bool
    advice: str = ""
    fatal: bool = False


def examine() -> list[Finding]:
    """Everything, in the order in which one thing needs the other."""
    machine = describe_machine(PACKAGES)
    hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}"
    findings = [
        Finding("machine", hardware, True),
        Finding("packages", ", ".join(f"{name} {machine[name]}" for name in PACKAGES if name in machine), True),
        _one_runtime(),
    ]
    try:
        import onnxruntime as ort
    except ImportError as error:
        return [*findings, Finding("import onnxruntime", str(error), False, "pip install onnxruntime-gpu", fatal=True)]
    providers = ort.get_available_providers()
    has_provider = "CUDAExecutionProvider" in providers
    advice = "" if has_provider else "for CUDA: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
    findings.append(Finding("providers", ", ".join(providers), True, advice))
    cards = cuda_devices()
    findings.append(Finding("NVIDIA driver", f"{cards} CUDA device(s)", True, "" if cards else "none: bundles run on the CPU"))
    if has_provider and cards:
        findings += _libraries(ort)
    return findings


def _one_runtime() -> Finding:
    found = []
    for name in RUNTIMES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    if len(found) == 1:
        return Finding("onnxruntime", found[0], True)
    if not found:
        return Finding("onnxruntime", "not installed", False, "pip install onnxruntime-gpu (or onnxruntime)", fatal=True)
    advice = "they overwrite each other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one"
    return Finding("onnxruntime", " and ".join(found), False, advice, fatal=True)


def _libraries(ort: Any) -> list[Finding]:
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
