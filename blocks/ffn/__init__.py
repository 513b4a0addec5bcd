"""Variants of the FFN subblock, a file per kind."""

from blocks.ffn import parent, width, linear, no_op  # noqa: F401, I001  order of registration
