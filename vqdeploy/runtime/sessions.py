"""Opens onnxruntime sessions on the chosen device, and on no other."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vqdeploy.runtime.library import onnxruntime
from vqdeploy.runtime.protobuf import Graph, read_graph
from vqdeploy.search import bytes_per_latent
from vqdeploy.stages import (
    INDEX_TYPES,
    INDICES,
    POSITION,
    PREVIOUS,
    Port,
    ports_of,
    stage_of,
)
from vqref.errors import CommandError, InputError, MachineError, Remark
from vqref.prior import PriorSpec
from vqref.spec import Layer, ModelSpec, plan
from vqref.validation import Array

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
"""onnxruntime's names for the providers."""

PROVIDERS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {CPU: {}},
    "cuda": {CUDA: {"use_tf32": "0"}},
}
"""onnxruntime's providers and their options, per device. ``Session`` explains TF32."""

DEVICES = ("auto", *PROVIDERS)

WORK_BYTES = 256 * 2**20
"""Roughly how many bytes the intermediate arrays of one call may take. Larger inputs are cut, so
that memory stays flat."""

LARGEST_BATCH = 256
"""The most images in one call. More were no faster."""

CACHE_BYTES = 2 * 2**20
"""The bytes that the widest row of a network may take per CPU core. More does not fit the caches: a
batch of 256 in one piece took up to a quarter longer, depending on the machine's other load."""

NETWORK_OPERATORS = frozenset({"Conv", "ConvTranspose"})
"""Operators that occur only in graphs with a network."""

INT8_OPERATOR = "QuantizeLinear"
"""An operator that occurs only in graphs with an int8 network."""

DIRECT_OPERATOR, PRODUCT_OPERATOR = "ArgMin", "NonZero"
"""An operator of every search for the nearest code, and one of searches by products only."""

OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")
"""Words in onnxruntime's errors that mean too little memory."""


@dataclass(frozen=True)
class Runtime:
    """Settings for onnxruntime besides the device.

    providers: a list of names or (name, options) for onnxruntime, used instead of the device's.
    session_options: an onnxruntime.SessionOptions to start from.
    intra_op_num_threads: threads within an operator, or None for onnxruntime's choice.
    """

    providers: Sequence[Any] | None = None
    session_options: Any = None
    intra_op_num_threads: int | None = None


class Session:
    """One graph of a bundle in onnxruntime. Several threads may call it at once.

    stage: one of ``STAGES`` or ``PRIOR_STAGES``.
    content: the bytes of its ONNX file, or what ``read_graph`` returned for them.
    spec: the model's, or the prior's for its stages.
    device: "cpu" or "cuda".
    batch: the only batch size that the graph takes, or None if it takes any. Smaller inputs are
        padded to it.

    On CUDA, a node that would run on the CPU is an error. The session also runs once when it opens,
    because only then cuDNN says whether it has an engine for each layer.

    TF32 is off for float32 graphs. For matrix products that is strict. For convolutions it is only
    a preference: if cuDNN has no other plan, it silently uses tensor cores. The environment
    variable NVIDIA_TF32_OVERRIDE=0 is stricter. Graphs with float16 networks leave TF32 on; without
    it float16 would lose its tensor cores too. The float32 part of these graphs is the quantizer:
    its direct form has no matrix product, and its search by products has a margin for TF32.

    Raises InputError for bytes that are not that stage of a model of ``spec``. Raises MachineError
    if the device, or the first of the providers, cannot be used.
    """

    def __init__(
        self,
        stage: str,
        content: bytes | Graph,
        spec: ModelSpec | PriorSpec,
        device: str,
        *,
        batch: int | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self._name = f"{stage}.onnx"
        self._outputs = stage_of(stage).outputs
        self._fixed = batch
        graph = inspected(stage, content, spec, batch)
        self._inputs = graph.inputs
        self._open(graph, device, runtime or Runtime())
        self._largest = batch or batch_size(spec, graph.operators, self._cores)
        if self._on_card:
            self._warm_up()

    def _open(self, graph: Graph, device: str, runtime: Runtime) -> None:
        ort, operators = onnxruntime(), graph.operators
        options = runtime.session_options or ort.SessionOptions()
        if runtime.session_options is None:
            options.log_severity_level = 4  # errors come as exceptions and are printed as one line
        if runtime.intra_op_num_threads is not None:
            options.intra_op_num_threads = runtime.intra_op_num_threads
        if runtime.providers is None:
            providers = _providers(device, graph)
        else:
            providers = list(runtime.providers)
        wanted = [given if isinstance(given, str) else given[0] for given in providers]
        self._on_card = wanted[:1] == [CUDA]
        for entry, value in _config(operators, device, runtime, on_card=self._on_card).items():
            options.add_session_config_entry(entry, value)
        try:
            self._session = ort.InferenceSession(graph.to_bytes(), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no base class
            found = f"{self._name}: onnxruntime cannot run it on {', '.join(wanted)}"
            raise _failure(found, error, InputError if wanted == [CPU] else MachineError) from None
        self._session.disable_fallback()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if wanted and self.providers[0] != wanted[0]:
            raise MachineError(
                f"{self._name}: asked for {wanted[0]}, onnxruntime chose {self.providers[0]}"
            )
        on_cpu = self.providers[0] == CPU and operators & NETWORK_OPERATORS
        self._cores = (options.intra_op_num_threads or os.cpu_count() or 1) if on_cpu else 0

    def _warm_up(self) -> None:
        """Runs once. Raises MachineError if that fails."""
        try:
            self._call(
                *(np.zeros([1, *map(int, port.shape[1:])], port.dtype) for port in self._inputs)
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            found = f"{self._name}: its first run on {CUDA} failed"
            raise _failure(found, error, MachineError) from None

    def placement(self) -> dict[str, dict[str, int]]:
        """Returns {provider: {operator: count of nodes}} after onnxruntime's optimisation."""
        found: dict[str, dict[str, int]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts = Counter(found.get(part.ep_name, {}))
            counts.update(node.op_type for node in part.get_nodes())
            found[part.ep_name] = dict(sorted(counts.items()))
        return found

    def __call__(self, *arrays: Array) -> list[Array]:
        """Returns the graph's outputs for its inputs, both in the graph's order.

        Indices in the outputs are always int64. Large inputs are run a few images at a time. Raises
        InputError if the graph fails on the CPU. Raises MachineError if it fails on another
        provider or there is too little memory.
        """
        try:
            count = len(arrays[0])
            if count <= self._largest:
                return self._call(*arrays)
            parts = [
                self._call(*self._part(arrays, slice(start, start + self._largest)))
                for start in range(0, count, self._largest)
            ]
            return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
        except Exception as error:  # onnxruntime's exceptions share no base class
            found = f"{self._name}: onnxruntime failed to run it on {self.providers[0]}"
            kind = InputError if self.providers[0] == CPU else MachineError
            raise _failure(found, error, kind) from None

    def _part(self, arrays: Sequence[Array], rows: slice) -> list[Array]:
        """Cuts the inputs that have one row per image; returns the others whole."""
        return [
            array[rows] if self._per_image(port) else array
            for port, array in zip(self._inputs, arrays, strict=True)
        ]

    def _per_image(self, port: Port) -> bool:
        return port.name != POSITION

    def _call(self, *arrays: Array) -> list[Array]:
        """Pads the batch with zeros, runs the graph, and crops the outputs.

        A fixed graph takes one size. On a card, sizes are powers of two, because cuDNN chooses its
        algorithms again at each new size.
        """
        count = len(arrays[0])
        size = self._fixed or count
        if self._on_card and not self._fixed and count:
            size = 1 << (count - 1).bit_length()
        given = {
            port.name: self._fitted(port, array, size - count)
            for port, array in zip(self._inputs, arrays, strict=True)
        }
        found = self._bound(given) if self._on_card else self._session.run(None, given)
        return [
            np.asarray(output, np.int64 if name == INDICES else None)[:count]
            for name, output in zip(self._outputs, found, strict=True)
        ]

    def _fitted(self, port: Port, array: Array, more: int) -> Array:
        """Casts indices to the graph's dtype, and adds ``more`` rows of zeros."""
        if port.name in (INDICES, PREVIOUS):
            array = array.astype(port.dtype, copy=False)
        if not more or not self._per_image(port):
            return array
        return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])

    def _bound(self, given: Mapping[str, Array]) -> list[Array]:
        """Runs with bound outputs: onnxruntime then copies each output once, at the end."""
        binding = self._session.io_binding()
        for name, array in given.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())


def inspected(
    stage: str, content: bytes | Graph, spec: ModelSpec | PriorSpec, batch: int | None
) -> Graph:
    """Returns the graph of ``stage``.

    Raises InputError if ``read_graph`` refuses it, or if its inputs and outputs are not those of
    this stage of a model of ``spec``.
    """
    name = f"{stage}.onnx"
    graph = content if isinstance(content, Graph) else read_graph(name, content)
    known = ports_of(stage, spec, batch, _index_type(graph))
    for way, names, found in (
        ("inputs", stage_of(stage).inputs, graph.inputs),
        ("outputs", stage_of(stage).outputs, graph.outputs),
    ):
        wanted = tuple(known[port] for port in names)
        if found != wanted:
            given, expected = (
                [(port.name, port.dtype, list(port.shape)) for port in each]
                for each in (found, wanted)
            )
            raise InputError(
                f"{name}: its {way} are {given}, expected {expected} for the manifest's model"
            )
    return graph


def _index_type(graph: Graph) -> str:
    """Returns the dtype of a graph's indices; the first of ``INDEX_TYPES`` if it has none."""
    found = {
        port.dtype for port in (*graph.inputs, *graph.outputs) if port.name in (INDICES, PREVIOUS)
    }
    return next((dtype for dtype in INDEX_TYPES if dtype in found), INDEX_TYPES[0])


def _providers(device: str, graph: Graph) -> list[Any]:
    """Returns the device's providers with the options that a graph needs."""
    if device == "cuda":
        return [(CUDA, cuda_options(graph))]
    return list(PROVIDERS[device].items())


def cuda_options(graph: Graph) -> dict[str, str]:
    """Returns the CUDA provider's options for a graph. ``Session`` explains TF32."""
    half = any(tensor.dtype == "float16" for tensor in graph.tensors.values())
    return {**PROVIDERS["cuda"][CUDA], **({"use_tf32": "1"} if half else {})}


def _config(
    operators: frozenset[str], device: str, runtime: Runtime, *, on_card: bool
) -> dict[str, str]:
    """Returns onnxruntime's session configuration."""
    entries = {
        "session.load_model_format": "ONNX",  # even if its first bytes look like another format
        "session.record_ep_graph_assignment_info": "1",  # for placement()
    }
    if device == "cuda" and runtime.providers is None:
        entries["session.disable_cpu_ep_fallback"] = "1"
    if on_card and INT8_OPERATOR in operators:
        # The CUDA provider has no DequantizeLinear for int32 biases. onnxruntime folds these nodes
        # into float32 biases unless it looks for int8 kernels, which CUDA lacks.
        entries["session.disable_quant_qdq"] = "1"
    return entries


def _failure(found: str, error: Exception, kind: type[CommandError]) -> CommandError:
    """Returns onnxruntime's error as one line. It is of ``kind``, or MachineError for memory."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, MemoryError) or any(words in line for words in OUT_OF_MEMORY):
        return MachineError(f"{found}: there is too little memory: {line}")
    return kind(f"{found}: {line}")


def batch_size(spec: ModelSpec | PriorSpec, operators: frozenset[str], cores: int = 0) -> int:
    """Returns how many images go through a graph of ``operators`` at once.

    What the graph holds at a time stays within WORK_BYTES: the values of its network that are still
    needed, or the arrays of its search. On a CPU, the widest row of a network also stays within
    CACHE_BYTES per core. cores: the number of cores, or 0 for no such limit.
    """
    if isinstance(spec, PriorSpec):
        widest = max(
            [spec.latent_size * spec.num_codes, *(math.prod(r.out_shape) for r in spec.rows)]
        )
        return max(1, min(LARGEST_BATCH, WORK_BYTES // (4 * 4 * widest)))
    k, d, held = spec.num_codes, spec.code_size, 1
    if operators & NETWORK_OPERATORS:
        held = 4 * max(_most_values(spec.encoder), _most_values(spec.decoder))
    if DIRECT_OPERATOR in operators:
        per_latent = 8 * k * d  # differences and their squares, float32
        if PRODUCT_OPERATOR in operators:
            per_latent = bytes_per_latent(spec)
        held = max(held, spec.latent_size * per_latent)
    largest = min(LARGEST_BATCH, WORK_BYTES // held)
    if cores:
        widest = max(math.prod(layer.out_shape) for layer in spec.layers)
        largest = min(largest, cores * CACHE_BYTES // (4 * widest))
    return max(1, largest)


@lru_cache(16)
def _most_values(layers: tuple[Layer, ...]) -> int:
    """Returns the most numbers per image that are needed at once.

    Cached, because every session of a model asks for it.
    """
    sizes = [math.prod(shape) for shape in (layers[0].in_shape, *(row.out_shape for row in layers))]
    needed, most = {0}, 0
    for number, step in enumerate(plan(layers), 1):
        needed.add(number)
        most = max(most, sum(sizes[i] for i in needed))
        needed -= set(step.spent)
    return most


def open_sessions(
    graphs: Mapping[str, bytes | Graph],
    spec: ModelSpec | PriorSpec,
    device: str,
    *,
    batch: int | None = None,
    runtime: Runtime | None = None,
) -> tuple[dict[str, Session], str]:
    """Returns a session for each {stage: content}, and the device that they run on.

    The device is "custom" if the caller gives providers. All graphs are inspected before
    onnxruntime sees the first. "auto" takes CUDA if there is a card. If the card then cannot be
    used, this warns (Remark) and takes the CPU.

    Raises ValueError for an unknown device, and for a device together with providers. Raises what
    Session raises.
    """

    plain = {stage: inspected(stage, graph, spec, batch) for stage, graph in graphs.items()}

    def opened(chosen: str) -> dict[str, Session]:
        return {
            stage: Session(stage, graph, spec, chosen, batch=batch, runtime=runtime)
            for stage, graph in plain.items()
        }

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
            f"there is a CUDA device, but it cannot be used: {error}; running on the CPU",
            Remark,
            stacklevel=2,
        )
        return opened("cpu"), "cpu"


def resolve_device(device: str) -> str:
    """Returns "cpu" or "cuda"; "auto" is CUDA if there is a card and onnxruntime has the provider.

    Raises ValueError for another name, MachineError for "cuda" if it cannot be used.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    obstacle = None
    if CUDA not in onnxruntime().get_available_providers():
        obstacle = (
            "this onnxruntime has no CUDA provider; install onnxruntime-gpu in place of onnxruntime"
        )
    elif not cuda_devices():
        obstacle = "the NVIDIA driver reports no device"
    if obstacle and device == "cuda":
        raise MachineError(f"device cuda: {obstacle}; use device cpu or auto")
    return "cpu" if obstacle else "cuda"


def quiet() -> None:
    """Keeps onnxruntime's own lines off stderr: for programs whose errors are one line."""
    onnxruntime().set_default_logger_severity(4)


def cuda_devices() -> int:
    """Returns how many CUDA devices the NVIDIA driver reports, 0 without a driver.

    Loads nothing but the driver's library.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
