"""onnxruntime sessions on the device that was asked for, and no other."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.commandline import InputError, MachineError

DEVICES = ("auto", "cpu", "cuda")


class Session:
    """One graph in onnxruntime. Calls are thread-safe, as onnxruntime's are.

    content: the bytes of the ONNX file. device: "cpu" or "cuda", as ``resolve_device`` gives it. On CUDA, TF32 is off and
    a node that would run on the CPU is an error: what was asked for is what runs.
    Raises InputError for bytes that onnxruntime refuses, MachineError where the device cannot be used.
    """

    def __init__(self, name: str, content: bytes, device: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings of a healthy load are of no use to an application
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            ort.preload_dlls()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
        try:
            self._session = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = f"{name}: onnxruntime cannot run it on {device}: {str(error).splitlines()[0]}"
            raise (MachineError if device == "cuda" else InputError)(reason) from None
        self._session.disable_fallback()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if device == "cuda" and self.providers[0] != "CUDAExecutionProvider":
            raise MachineError(f"{name}: asked for CUDA, onnxruntime chose {self.providers[0]}; see its log above")
        self._inputs = [port.name for port in self._session.get_inputs()]

    def __call__(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The graph's outputs, in their order, for its one input."""
        return [np.asarray(output) for output in self._session.run(None, {self._inputs[0]: array})]


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda". "auto" takes CUDA where there is a card and onnxruntime has the provider.

    Raises ValueError for another name, MachineError for "cuda" where it cannot be used.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    import onnxruntime as ort

    obstacle = None
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        obstacle = "this onnxruntime has no CUDA provider; install onnxruntime-gpu in place of onnxruntime"
    elif not cuda_devices():
        obstacle = "the NVIDIA driver reports no device"
    if obstacle and device == "cuda":
        raise MachineError(f"device cuda: {obstacle}; use device cpu or auto")
    return "cpu" if obstacle else "cuda"


def cuda_devices() -> int:
    """How many CUDA devices the NVIDIA driver reports; 0 where there is no driver. Loads the driver's library, nothing else."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
