"""``python -m benchmarks.advance_grid MODEL IMAGES``: ``benchmarks.advance`` of a grid of tokens,
under a name of its own, since each stored table has the name of its module."""

from benchmarks.advance import main

if __name__ == "__main__":
    main()
