"""``python -m benchmarks.advance_grid MODEL IMAGES``: ``benchmarks.advance`` for a grid of tokens.

It is a module of its own because each stored table has the name of its module."""

from benchmarks.advance import main

if __name__ == "__main__":
    main()
