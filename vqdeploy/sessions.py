"""onnxruntime sessions on the device that was asked for, and no other."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

CACHE_BYTES = 2 * 2**20
"""For each core: what the widest layer of a network may take at once on a processor. More leaves its caches: a batch of 256
in one piece took up to a quarter longer, depending on what else the machine did."""

PROVIDERS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {"CPUExecutionProvider": {}},
    "cuda": {"CUDAExecutionProvider": {"use_tf32": "0"}},
}
"""onnxruntime's providers and their options, by device."""

NETWORK_OPERATORS = frozenset({"Conv", "ConvTranspose"})
"""What a graph holds that is not a look-up or a search alone."""

_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}


@dataclass(frozen=True)
class Runtime:
    """How onnxruntime is to run, beyond the device.

    providers: onnxruntime's own list, of names or (name, options), in place of the device's. session_options: an
    onnxruntime.SessionOptions to begin with. intra_op_num_threads: threads within an operator, None for onnxruntime's choice.
    """

    providers: Sequence[Any] | None = None
    session_options: Any = None
    intra_op_num_threads: int | None = None


class Session:
    """One graph of a bundle in onnxruntime. Calls are thread-safe, as onnxruntime's are.

    stage: which of STAGES. content: the bytes of its ONNX file. device: "cpu" or "cuda". On CUDA, TF32 is off and a node that
    would run on the CPU is an error: what was asked for is what runs. batch: the one size that the graph takes, None where
    any will do; smaller inputs are padded to it.
    Raises InputError for bytes that are not that stage of a model of ``spec``, MachineError where the device, or the first
    of the providers, cannot be used.
    """

    def __init__(
        self,
        stage: str,
        content: bytes,
        spec: ModelSpec,
        device: str,
        *,
        batch: int | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        import onnxruntime as ort

        name, runtime = f"{stage}.onnx", runtime or Runtime()
        operators = require_plain(name, content)
        options = runtime.session_options or ort.SessionOptions()
        if runtime.session_options is None:
            options.log_severity_level = 4  # its errors reach us as exceptions, and the caller as one line
        if runtime.intra_op_num_threads is not None:
            options.intra_op_num_threads = runtime.intra_op_num_threads
        providers = list(PROVIDERS[device].items())
        if runtime.providers is not None:
            providers = list(runtime.providers)
        elif device == "cuda":
            ort.preload_dlls()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = [given if isinstance(given, str) else given[0] for given in providers]
        try:
            self._session = ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            reason = f"{name}: onnxruntime cannot run it on {', '.join(wanted)}: {str(error).splitlines()[0]}"
            raise (InputError if wanted == ["CPUExecutionProvider"] else MachineError)(reason) from None
        self._session.disable_fallback()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if wanted and self.providers[0] != wanted[0]:
            raise MachineError(f"{name}: asked for {wanted[0]}, onnxruntime chose {self.providers[0]}")
        self._require_ports(stage, spec, batch)
        self._input, self._outputs = STAGES[stage].inputs[0], STAGES[stage].outputs
        self._fixed = batch
        self._on_card = self.providers[0] == "CUDAExecutionProvider"
        cores = 0
        if self.providers[0] == "CPUExecutionProvider" and operators & NETWORK_OPERATORS:
            cores = options.intra_op_num_threads or os.cpu_count() or 1
        self._largest = batch or batch_size(spec, cores)

    def __call__(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The graph's outputs, in their order, for its one input; a few images at a time."""
        if len(array) <= self._largest:
            return self._call(array)
        parts = [self._call(array[start : start + self._largest]) for start in range(0, len(array), self._largest)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _call(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """One run. Where batches of few sizes are wanted, the array is filled up with zeros and the answer cut back: a
        fixed graph takes one size, and cuDNN looks for its algorithms anew at each."""
        count = len(array)
        size = self._fixed or (1 << max(0, count - 1).bit_length() if self._on_card and count else count)
        if size != count:
            array = np.concatenate([array, np.zeros((size - count, *array.shape[1:]), array.dtype)])
        found = self._bound(array) if self._on_card else self._session.run(None, {self._input: array})
        return [np.asarray(output)[:count] for output in found]

    def _bound(self, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """A run whose outputs are bound: onnxruntime copies each once, when all are there."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._input, np.ascontiguousarray(array))
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    def _require_ports(self, stage: str, spec: ModelSpec, batch: int | None) -> None:
        """Raises InputError unless the graph takes and gives what this stage of a model of ``spec`` does."""
        arrays = ports(spec, batch)
        for way, names, found in (
            ("inputs", STAGES[stage].inputs, self._session.get_inputs()),
            ("outputs", STAGES[stage].outputs, self._session.get_outputs()),
        ):
            expected = [(name, _TYPES[arrays[name].dtype], list(arrays[name].shape)) for name in names]
            given = [(port.name, port.type, list(port.shape)) for port in found]
            if given != expected:
                raise InputError(f"{stage}.onnx: its {way} are {given}, those of the manifest's model {expected}")


def batch_size(spec: ModelSpec, cores: int = 0) -> int:
    """How many images go through onnxruntime at once: their differences from the codebook, (S, K, D) float32 twice over,
    and the widest layer stay within WORK_BYTES; the widest layer of a network on a processor with so many cores within
    CACHE_BYTES for each. cores: 0 for a card, and for a graph without a network."""
    distances = 2 * spec.latent_size * spec.num_codes * spec.code_size
    widest = max(math.prod(layer.out_shape) for layer in spec.layers)
    largest = min(LARGEST_BATCH, WORK_BYTES // (4 * max(distances, 2 * widest)))
    if cores:
        largest = min(largest, cores * CACHE_BYTES // (4 * widest))
    return max(1, largest)


def open_sessions(
    graphs: Mapping[str, bytes],
    spec: ModelSpec,
    device: str,
    *,
    batch: int | None = None,
    runtime: Runtime | None = None,
) -> tuple[dict[str, Session], str]:
    """A session for each {stage: bytes}, and the device that they run on; with providers of the caller's own, "custom".

    "auto" takes CUDA where there is a card; where the card cannot be used after all, it warns (RuntimeWarning) and takes the
    CPU. Raises ValueError for another device, or one beside providers, and what Session raises.
    """

    def opened(chosen: str) -> dict[str, Session]:
        return {stage: Session(stage, content, spec, chosen, batch=batch, runtime=runtime) for stage, content in graphs.items()}

    if runtime is not None and runtime.providers is not None:
        if device != "auto":
            raise ValueError(f"device is {device!r} and providers are given; give one of the two")
        return opened("cpu"), "custom"
    chosen = resolve_device(device)
    try:
        return opened(chosen), chosen
    except MachineError as error:
        if device != "auto":
            raise
        warnings.warn(
            f"there is a CUDA device, but it cannot be used: {error}; running on the CPU", RuntimeWarning, stacklevel=2
        )
        return opened("cpu"), "cpu"


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
