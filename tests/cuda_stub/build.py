"""Builds stand-ins for the libraries of CUDA and cuDNN.

They let onnxruntime-gpu's CUDA provider load on a machine without a card. The provider is the real
one: it takes nodes, inserts copies and launches kernels as it would on a card. Only the libraries
below it do nothing, so all outputs are meaningless. The names of the libraries and functions are
read from the provider itself. The C files beside this one define the functions that must answer
something; all others are generated.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent

GENERATED = """
static int object;
#define WEAK __attribute__((weak)) /* a function of the same name in a C file takes its place */
#define CREATE(name) WEAK int name(void **handle) { *handle = &object; return 0; }
#define DONE(name) WEAK int name(void) { return 0; }
"""
"""The body of other functions: it succeeds, and gives a handle if the function creates one."""


def obstacle() -> str | None:
    """Says why the libraries cannot be built here, or returns None."""
    if missing := [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    if not provider().exists():
        return "onnxruntime-gpu is not installed"
    if "libcudart.so.13" not in libraries():
        return "this onnxruntime-gpu is not built for CUDA 13"
    return None


def build(folder: Path) -> None:
    """Writes the libraries to ``folder``; LD_LIBRARY_PATH must then name it."""
    for library, names in functions().items():
        _compile(folder, library, sorted(names))


def provider() -> Path:
    """Returns the path of onnxruntime's CUDA provider, which need not exist."""
    found = importlib.util.find_spec("onnxruntime")
    package = Path(found.origin).parent if found and found.origin else Path("onnxruntime")
    return package / "capi" / "libonnxruntime_providers_cuda.so"


def libraries() -> list[str]:
    """Returns the libraries of CUDA that the provider needs, cuDNN among them, by soname."""
    dynamic = _output("readelf", "--dynamic", str(provider()))
    needed = re.findall(r"\(NEEDED\).*\[(libcu.*)\]", dynamic)
    return [*needed, *([] if any("cudnn" in name for name in needed) else ["libcudnn.so.9"])]


def functions() -> dict[str, set[str]]:
    """Returns the names of the functions that the provider takes from each library.

    Symbol versions say which library a function is from; the driver's have none. A provider that is
    not linked with cuDNN looks its functions up by name, and holds these names as strings.
    """
    found: dict[str, set[str]] = {library: set() for library in libraries()}
    by_prefix = {"cudnn": "libcudnn.so.9", "curand": "libcurand.so.10", "cu": "libcuda.so.1"}
    for symbol in _output("nm", "-D", "--undefined-only", str(provider())).split():
        name, _, library = symbol.partition("@")
        prefix = next((p for p in by_prefix if name.startswith(p)), None)
        if library in found:
            found[library].add(name)
        elif not library and prefix:
            found.setdefault(by_prefix[prefix], set()).add(name)
    strings = re.findall(rb"\0(cudnn[A-Z]\w{,60})(?=\0)", provider().read_bytes())
    found["libcudnn.so.9"] |= {name.decode() for name in strings}
    return found


def _compile(folder: Path, library: str, names: list[str]) -> None:
    stem = library.removeprefix("lib").partition(".")[0]
    lines = [f"{'CREATE' if 'Create' in name else 'DONE'}({name})" for name in names]
    generated = folder / f"{stem}_generated.c"
    generated.write_text("\n".join([GENERATED, *lines, ""]))
    versions = folder / f"{stem}.map"
    versions.write_text(f"{library} {{ global: *; }};\n")
    sources = [generated, *(p for p in [HERE / f"{stem}.c"] if p.exists())]
    _output(
        *("gcc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}"),
        *(f"-Wl,--version-script,{versions}", "-o", str(folder / library)),
        *map(str, sources),
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
