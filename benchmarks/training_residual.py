"""``python -m benchmarks.training_residual``: ``benchmarks.training`` with ``--network residual``.

It is a module of its own because each stored table has the name of its module."""

from benchmarks.training import main

if __name__ == "__main__":
    main("residual")
