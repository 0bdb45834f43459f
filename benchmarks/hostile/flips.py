"""``python -m benchmarks.hostile.flips [--count N]``: flips single bits in files, and opens them.

Flips one bit at a time in every file of a bundle, in its certificate and in a model.pt. Opens each
as verify and export do. A flip is accepted if nothing raises InputError.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import vqref
from benchmarks.measure import Record, parser
from vqdeploy.bundle import FILES, Bundle
from vqdeploy.export import export
from vqdeploy.proof.certificate import CERTIFICATE, read_certificate, write_certificate
from vqdeploy.verify import verify
from vqref import families
from vqref.errors import InputError
from vqref.modelfile import Model
from vqtrain.modelfile import read_model, write_model


def campaign(count: int, seed: int = 0) -> dict[str, int]:
    """Returns {file: number of accepted flips}.

    Makes ``count`` flips in the bundle, equally many per file, and ``count // 2`` in model.pt.
    """
    rng, accepted = np.random.default_rng(seed), {}
    with tempfile.TemporaryDirectory() as place:
        folder, model = _made(Path(place))
        names = (*FILES, "manifest.json", CERTIFICATE)
        for i, name in enumerate(names):
            times = count // len(names) + (i < count % len(names))
            accepted[name] = _accepted(folder / name, times, rng, lambda: _opened(folder))
        accepted["model.pt"] = _accepted(model, count // 2, rng, lambda: read_model(model))
    return accepted


def _made(place: Path) -> tuple[Path, Path]:
    """Makes a bundle with a certificate, and the model.pt that it is made from."""
    spec = families.residual((3, 16, 16), 8, 1, 4, num_codes=32, code_size=8, variance=0.08)
    params = vqref.init_params(spec, np.random.default_rng(0))
    folder, model = place / "bundle", place / "model.pt"
    write_model(model, Model(spec, params, {"epochs": 1}))
    export(model, folder)
    bundle = Bundle.open(folder)
    write_certificate(folder / CERTIFICATE, bundle, verify(bundle, "cpu"), {})
    return folder, model


def _opened(folder: Path) -> None:
    """Opens all that ``verify`` and ``inspect`` read, until the graphs would run."""
    bundle = Bundle.open(folder)
    for name in FILES:
        bundle.read(name)
    read_certificate(folder / CERTIFICATE)


def _accepted(path: Path, count: int, rng: np.random.Generator, read: Callable[[], object]) -> int:
    content, accepted = path.read_bytes(), 0
    read()
    for bit in map(int, rng.integers(0, 8 * len(content), count)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            read()
            accepted += 1
        except InputError:
            continue
    path.write_bytes(content)
    return accepted


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--count", type=int, default=2000, help="flips in the bundle; half as many in model.pt"
    )
    options.add_argument("--seed", type=int, default=0, help="of the bits")
    arguments = options.parse_args()
    record = Record(arguments)
    accepted = campaign(arguments.count, arguments.seed)
    record.figures = accepted
    for name, number in accepted.items():
        record.say(f"{name:<18}{number:>4} accepted")
    flips = f"{arguments.count} flips in the bundle, {arguments.count // 2} in model.pt"
    record.say(f"{flips}: {sum(accepted.values())} accepted")
    record.write()
    return 1 if any(accepted.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
