"""What a bundle proves itself with, and what was proved."""
