"""onnxruntime sessions on the device that was asked for, and no other."""

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
"""onnxruntime's names of the providers."""

PROVIDERS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {CPU: {}},
    "cuda": {CUDA: {"use_tf32": "0"}},
}
"""Devices, and onnxruntime's providers with their options on each; see ``Session`` for TF32."""

DEVICES = ("auto", *PROVIDERS)

WORK_BYTES = 256 * 2**20
"""Roughly what one call may take for intermediate arrays; larger inputs are cut, so that memory
stays flat."""

LARGEST_BATCH = 256
"""More images at once were no faster."""

CACHE_BYTES = 2 * 2**20
"""What the widest row of a network may take per core of a CPU. More does not fit the caches: a
batch of 256 in one piece took up to a quarter longer, depending on what else the machine did."""

NETWORK_OPERATORS = frozenset({"Conv", "ConvTranspose"})
"""Operators that only graphs with a network hold."""

INT8_OPERATOR = "QuantizeLinear"
"""An operator that only graphs with an int8 network hold."""

DIRECT_OPERATOR, PRODUCT_OPERATOR = "ArgMin", "NonZero"
"""Operators of every search for the nearest code, and of searches by products alone."""

SCORE_BYTES, PAIR_BYTES = 6, 512
"""What a search by products takes per latent and code, for scores, and per latent and element, for
a few pairs of a latent and a group of codes. At S 1,024, K 16,384 and D 64 the two make 128 MiB per
image, where 101 MiB were measured."""

OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "Failed to allocate memory")
"""Words of onnxruntime's errors if memory does not suffice."""


@dataclass(frozen=True)
class Runtime:
    """How onnxruntime is to run, beyond the device.

    providers: onnxruntime's own list, of names or (name, options), in place of the device's.
    session_options: an onnxruntime.SessionOptions to begin with.
    intra_op_num_threads: threads within an operator, or None for onnxruntime's choice.
    """

    providers: Sequence[Any] | None = None
    session_options: Any = None
    intra_op_num_threads: int | None = None


class Session:
    """One graph of a bundle in onnxruntime. Calls are thread-safe, as onnxruntime's are.

    stage: one of ``STAGES`` or ``PRIOR_STAGES``.
    content: the bytes of its ONNX file, or what ``read_graph`` returned for them.
    spec: of the model, or of the prior for its stages.
    device: "cpu" or "cuda".
    batch: the one size that the graph takes, to which smaller inputs are padded, or None if it
        takes any.

    On CUDA a node that would run on the CPU is an error, and the session runs once when it opens,
    since cuDNN says only then whether it has an engine for each layer.

    TF32 is off for float32 graphs. That is strict for matrix products but only a preference for
    convolutions: if cuDNN has no other plan, it takes tensor cores all the same, silently. The
    environment variable NVIDIA_TF32_OVERRIDE=0 is the harder switch. Graphs with float16 networks
    leave TF32 on, without which float16 loses its tensor cores, too. Their float32 part is the
    quantizer: its direct form holds no product, and its margin by products allows for TF32.

    Raises InputError for bytes that are not that stage of a model of ``spec``, MachineError if the
    device, or the first of the providers, cannot be used.
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
            options.log_severity_level = 4  # errors reach us as exceptions, the caller as one line
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
        """Returns {provider: {operator: how many of its nodes run there}}, after onnxruntime's own
        changes of the graph."""
        found: dict[str, dict[str, int]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            counts = Counter(found.get(part.ep_name, {}))
            counts.update(node.op_type for node in part.get_nodes())
            found[part.ep_name] = dict(sorted(counts.items()))
        return found

    def __call__(self, *arrays: Array) -> list[Array]:
        """Returns the graph's outputs for its inputs, in their order. Indices are int64 here,
        whatever they are in the graph.

        Large inputs are run a few images at a time. Raises InputError if the graph cannot be run on
        the CPU, MachineError if on another provider, or if memory does not suffice.
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
        """Some images of those inputs that have one row per image."""
        return [
            array[rows] if self._per_image(port) else array
            for port, array in zip(self._inputs, arrays, strict=True)
        ]

    def _per_image(self, port: Port) -> bool:
        return port.name != POSITION

    def _call(self, *arrays: Array) -> list[Array]:
        """Pads the batch with zeros, runs the graph, and crops the outputs.

        A fixed graph takes one size; on a card sizes are powers of two, since cuDNN looks for its
        algorithms again at each new one.
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
        """An input in the graph's own type of indices, and with so many rows of zeros more."""
        if port.name in (INDICES, PREVIOUS):
            array = array.astype(port.dtype, copy=False)
        if not more or not self._per_image(port):
            return array
        return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])

    def _bound(self, given: Mapping[str, Array]) -> list[Array]:
        """Runs with bound outputs: onnxruntime copies each once, after the last node."""
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
    """Returns the graph of ``stage``. Raises InputError unless it is plain, see ``read_graph``, and
    its inputs and outputs are those of the stage of a model of ``spec``."""
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
                f"{name}: its {way} are {given}, those of the manifest's model {expected}"
            )
    return graph


def _index_type(graph: Graph) -> str:
    """Returns the one of ``INDEX_TYPES`` that the indices of a graph have; if none, the first."""
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
    """Returns the CUDA provider's options for a graph; see ``Session`` for TF32."""
    half = any(tensor.dtype == "float16" for tensor in graph.tensors.values())
    return {**PROVIDERS["cuda"][CUDA], **({"use_tf32": "1"} if half else {})}


def _config(
    operators: frozenset[str], device: str, runtime: Runtime, *, on_card: bool
) -> dict[str, str]:
    """Returns onnxruntime's session configuration."""
    entries = {
        "session.load_model_format": "ONNX",  # whatever else its first bytes may look like
        "session.record_ep_graph_assignment_info": "1",  # for placement()
    }
    if device == "cuda" and runtime.providers is None:
        entries["session.disable_cpu_ep_fallback"] = "1"
    if on_card and INT8_OPERATOR in operators:
        # Biases are int32, for which the CUDA provider has no DequantizeLinear. onnxruntime folds
        # these nodes into float32 biases unless it looks for int8 kernels, which there are not.
        entries["session.disable_quant_qdq"] = "1"
    return entries


def _failure(found: str, error: Exception, kind: type[CommandError]) -> CommandError:
    """What onnxruntime raised as one line, of ``kind`` unless memory did not suffice."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, MemoryError) or any(words in line for words in OUT_OF_MEMORY):
        return MachineError(f"{found}: there is too little memory: {line}")
    return kind(f"{found}: {line}")


def batch_size(spec: ModelSpec | PriorSpec, operators: frozenset[str], cores: int = 0) -> int:
    """Returns how many images go through a graph of ``operators`` at once.

    What the graph holds at a time stays within WORK_BYTES: the values of its network that are still
    needed, or the arrays of its search. On a CPU of so many cores, the widest row of a network
    stays within CACHE_BYTES per core. cores: 0 if that does not matter.
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
            per_latent = SCORE_BYTES * k + PAIR_BYTES * d
        held = max(held, spec.latent_size * per_latent)
    largest = min(LARGEST_BATCH, WORK_BYTES // held)
    if cores:
        widest = max(math.prod(layer.out_shape) for layer in spec.layers)
        largest = min(largest, cores * CACHE_BYTES // (4 * widest))
    return max(1, largest)


@lru_cache(16)
def _most_values(layers: tuple[Layer, ...]) -> int:
    """The most numbers per image that are needed at once. Every session of a model asks for it."""
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
    """Returns a session for each {stage: content} and the device that they run on, "custom" if the
    caller gives providers.

    All graphs are inspected before onnxruntime sees the first. "auto" takes CUDA if there is a
    card. If the card cannot be used after all, it warns (Remark) and takes the CPU.

    Raises ValueError for another device, or for one beside providers, and what Session raises.
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
