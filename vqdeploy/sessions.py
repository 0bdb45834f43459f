"""onnxruntime sessions on the device that was asked for, and no other."""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vqdeploy.protobuf import require_plain
from vqdeploy.stages import STAGES, ports
from vqref.commandline import InputError, MachineError
from vqref.spec import ModelSpec

DEVICES = ("auto", "cpu", "cuda")

WORK_BYTES = 256 * 2**20
"""About what one call may take for intermediate arrays; larger inputs are cut, so that memory stays flat."""

LARGEST_BATCH = 256
"""More images at once were no faster."""

PROVIDERS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {"CPUExecutionProvider": {}},
    "cuda": {"CUDAExecutionProvider": {"use_tf32": "0"}},
}
"""onnxruntime's providers and their options, by device."""

_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


class Session:
    """One graph of a bundle in onnxruntime. Calls are thread-safe, as onnxruntime's are.

    stage: which of STAGES. content: the bytes of its ONNX file. device: "cpu" or "cuda". On CUDA, TF32 is off and a node that
    would run on the CPU is an error: what was asked for is what runs.
    Raises InputError for bytes that are not that stage of a model of ``spec``, MachineError where the device cannot be used.
    """

    def __init__(self, stage: str, content: bytes, spec: ModelSpec, device: str) -> None:
        import onnxruntime as ort

        name = f"{stage}.onnx"
        require_plain(name, content)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors reach us as exceptions, and the caller as one line
        if device == "cuda":
            ort.preload_dlls()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            self._session = ort.InferenceSession(content, options, providers=list(PROVIDERS[device].items()))
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = f"{name}: onnxruntime cannot run it on {device}: {str(error).splitlines()[0]}"
            raise (MachineError if device == "cuda" else InputError)(reason) from None
        self._session.disable_fallback()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if device == "cuda" and self.providers[0] != "CUDAExecutionProvider":
            raise MachineError(f"{name}: asked for CUDA, onnxruntime chose {self.providers[0]}")
        self._require_ports(stage, spec)
        self._input = STAGES[stage].inputs[0]
        self._batch = batch_size(spec)

    def __call__(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The graph's outputs, in their order, for its one input; a few images at a time."""
        if len(array) <= self._batch:
            return self._call(array)
        parts = [self._call(array[start : start + self._batch]) for start in range(0, len(array), self._batch)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _call(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        return [np.asarray(output) for output in self._session.run(None, {self._input: array})]

    def _require_ports(self, stage: str, spec: ModelSpec) -> None:
        """Raises InputError unless the graph takes and gives what this stage of a model of ``spec`` does."""
        arrays = ports(spec)
        for way, names, found in (
            ("inputs", STAGES[stage].inputs, self._session.get_inputs()),
            ("outputs", STAGES[stage].outputs, self._session.get_outputs()),
        ):
            expected = [(name, _TYPES[arrays[name].dtype], list(arrays[name].shape)) for name in names]
            given = [(port.name, port.type, list(port.shape)) for port in found]
            if given != expected:
                raise InputError(f"{stage}.onnx: its {way} are {given}, those of the manifest's model {expected}")


def batch_size(spec: ModelSpec) -> int:
    """How many images go through onnxruntime at once: their differences from the codebook, (S, K, D) float32 twice over,
    and the widest layer stay within WORK_BYTES."""
    distances = 2 * spec.latent_size * spec.num_codes * spec.code_size
    widest = 2 * max(math.prod(layer.out_shape) for layer in spec.layers)
    return max(1, min(LARGEST_BATCH, WORK_BYTES // (4 * max(distances, widest))))


def open_sessions(graphs: Mapping[str, bytes], spec: ModelSpec, device: str) -> tuple[dict[str, Session], str]:
    """A session for each {stage: bytes}, and the device that they run on.

    "auto" takes CUDA where there is a card; where the card cannot be used after all, it warns (RuntimeWarning) and takes the
    CPU. Raises ValueError for another device, and what Session raises.
    """
    chosen = resolve_device(device)
    try:
        return {stage: Session(stage, content, spec, chosen) for stage, content in graphs.items()}, chosen
    except MachineError as error:
        if device != "auto":
            raise
        warnings.warn(
            f"there is a CUDA device, but it cannot be used: {error}; running on the CPU", RuntimeWarning, stacklevel=2
        )
        return {stage: Session(stage, content, spec, "cpu") for stage, content in graphs.items()}, "cpu"


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
