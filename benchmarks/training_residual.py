"""``python -m benchmarks.training_residual``: ``benchmarks.training`` with ``--network residual``,
under a name of its own, since each stored table has the name of its module."""

from benchmarks.training import main

if __name__ == "__main__":
    main("residual")
