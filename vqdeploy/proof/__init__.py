"""The checks that verify a bundle, and the certificates on what they found."""
