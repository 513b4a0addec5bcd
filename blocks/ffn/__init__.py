"""The kinds of variants of the FFN subblock, a file for each. blocks/kinds.py lists them."""
