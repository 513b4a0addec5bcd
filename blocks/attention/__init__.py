"""The kinds of variants of the attention subblock, a file for each. blocks/kinds.py lists them."""
