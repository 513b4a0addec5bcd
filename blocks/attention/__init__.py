"""Variants of the attention subblock, a file per kind."""

from blocks.attention import parent, kv_heads, linear, no_op  # noqa: F401, I001  order of registration
