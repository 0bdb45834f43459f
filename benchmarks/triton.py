"""``python -m benchmarks.triton BUNDLE SERVER``: compares a server's tokens with the Codec's.

A real Triton server loads the repository that ``vqdeploy triton`` writes, and answers many clients
at once.

SERVER is a folder with a server for Linux without Docker: ``pip install --no-deps --target SERVER
nvidia-pytriton``. That server lacks the ONNX Runtime backend. So a backend in Python takes its name
here, and runs the graphs by Python's onnxruntime on the CPU. The rest is real: the repository, each
configuration, its warm-up, and the batches that the server forms.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient import grpc

from benchmarks.measure import Record, parser
from benchmarks.pictures import fields
from vqdeploy import Codec
from vqdeploy.bundle import Bundle
from vqdeploy.triton import write_repository

CLIENTS = 16

BACKEND = '''
import json

import numpy
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, given):
        config = json.loads(given["model_config"])
        self.inputs = [port["name"] for port in config["input"]]
        self.outputs = [port["name"] for port in config["output"]]
        path = f"{given['model_repository']}/{given['model_version']}/model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """One run for the requests that the server puts into one batch. Arrays go by DLPack: the
        server's program knows those of numpy 1 alone."""
        parts = [
            {
                name: numpy.from_dlpack(triton.get_input_tensor_by_name(each, name))
                for name in self.inputs
            }
            for each in requests
        ]
        whole = {name: numpy.concatenate([part[name] for part in parts]) for name in self.inputs}
        found = self.session.run(self.outputs, whole)
        ends = numpy.cumsum([len(part[self.inputs[0]]) for part in parts])[:-1]
        split = [numpy.split(array, ends) for array in found]
        return [
            triton.InferenceResponse(
                [
                    triton.Tensor.from_dlpack(name, numpy.array(array))
                    for name, array in zip(self.outputs, arrays)
                ]
            )
            for arrays in zip(*split)
        ]
'''


@contextmanager
def served(server: Path, models: Path, place: Path) -> Iterator[str]:
    """Starts the server and yields its address. Exits with its last lines if it does not start."""
    given, backends = server / "pytriton" / "tritonserver", place / "backends"
    shutil.copytree(given / "backends", backends)
    (backends / "onnxruntime").mkdir()
    (backends / "onnxruntime" / "model.py").write_text(BACKEND)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = given / "python_backend_stubs" / version / "triton_python_backend_stub"
    for program in (shutil.copy(stub, backends / "python"), given / "bin" / "tritonserver"):
        Path(program).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [path for path in sys.path if path.endswith("site-packages")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(server / "nvidia_pytriton.libs"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    words = [f"--model-repository={models}", f"--backend-directory={backends}"]
    quiet = ["--allow-metrics=false", "--allow-http=false", "--grpc-address=127.0.0.1"]
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [given / "bin" / "tritonserver", *words, *quiet, f"--grpc-port={port}"],
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        address = f"127.0.0.1:{port}"
        for _ in range(120):
            if process.poll() is not None:
                sys.exit("\n".join(log.read_text().splitlines()[-20:]))
            try:
                if grpc.InferenceServerClient(address).is_server_ready():
                    break
            except grpc.InferenceServerException:
                pass  # the server does not listen yet
            time.sleep(0.5)
        else:
            sys.exit(f"the server was not ready in a minute: {log.read_text()[-1000:]}")
        yield address
    finally:
        process.terminate()
        process.wait()


def asked(
    client: grpc.InferenceServerClient,
    stage: str,
    given: dict[str, npt.NDArray[Any]],
    wanted: str,
    ends: npt.NDArray[np.int64],
) -> npt.NDArray[Any]:
    """Returns an output of a stage for its one input.

    ``CLIENTS`` send the input at once, in requests that end at these rows.
    """
    ((name, array),) = given.items()
    types = {"float32": "FP32", "int64": "INT64"}

    def ask(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        port = grpc.InferInput(name, list(part.shape), types[part.dtype.name])
        port.set_data_from_numpy(part)
        return client.infer(stage, [port]).as_numpy(wanted)

    with ThreadPoolExecutor(CLIENTS) as clients:
        return np.concatenate(list(clients.map(ask, np.split(array, ends))))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("server", type=Path)
    options.add_argument("--images", type=int, default=1000, help="(default: %(default)s)")
    arguments = options.parse_args()
    record, bundle = Record(arguments), Bundle.open(arguments.bundle)
    images = fields(arguments.images, bundle.spec.image_shape).astype(np.float32) / 255
    codec = Codec.load(arguments.bundle, "cpu")
    tokens = codec.encode(images)
    pictures = codec.decode(tokens)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        names = write_repository(bundle, place / "models")
        start = time.perf_counter()
        with served(arguments.server, place / "models", place) as address:
            client = grpc.InferenceServerClient(address)
            metadata = client.get_server_metadata()
            seconds = time.perf_counter() - start
            ready = [stage for stage in names if client.is_model_ready(stage)]
            record.say(f"Triton {metadata.version}: {', '.join(ready)} ready in {seconds:.0f} s")
            ends = np.cumsum(np.random.default_rng(0).integers(1, 5, len(images)))
            ends = ends[ends < len(images)]  # ends of requests of 1 to 4 images
            told = asked(client, "tokenizer", {"images": images}, "indices", ends)
            shown = asked(client, "detokenizer", {"indices": tokens}, "reconstructions", ends)
            found: dict[str, Any] = {
                "tokens": tokens.size,
                "differ": int((told != tokens).sum()),
                "pictures off by": float(np.abs(shown - pictures).max()),
            }
            for stage in ("tokenizer", "detokenizer"):
                (counted,) = client.get_inference_statistics(stage).model_stats
                found[stage] = {"requests": len(ends) + 1, "runs": int(counted.execution_count)}
            digest = client.get_model_config("tokenizer").config.parameters["manifest_sha256"]
            found["digest"] = digest.string_value == bundle.sha256
    record.figures = {"ready": ready, "server": metadata.version, **found}
    record.say(
        f"{found['tokens']} tokens of {len(images)} images, {found['differ']} differ from the "
        f"Codec's; pictures off by at most {found['pictures off by']:.1e}"
    )
    for stage in ("tokenizer", "detokenizer"):
        record.say(
            f"{stage}: {found[stage]['requests']} requests in {found[stage]['runs']} runs of the "
            "graph"
        )
    record.say(f"the digest that a client reads is the bundle's: {found['digest']}")
    record.write()


if __name__ == "__main__":
    main()
