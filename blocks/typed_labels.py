"""Labels of variants in a type of number: `ffn768@iq4_nl` is the variant `ffn768`, its matrices in `iq4_nl`.

A label without a type is in the precision of the profile (`hardware.precision`). A no-op has no weights and no type.
"""

FITTED_TO = 24  # sequences of the corpus that types of 4 and 5 bits are fitted to


def bare(label: str) -> str:
    """The variant alone: `ffn768` of `ffn768@iq4_nl`."""
    return label.partition("@")[0]


def type_in(label: str) -> str:
    """The type alone: `iq4_nl` of `ffn768@iq4_nl`; "" for the profile's own precision."""
    return label.partition("@")[2]


def typed(label: str, kind: str) -> str:
    """The variant in a type; "" leaves it in the profile's own precision."""
    return f"{bare(label)}@{kind}" if kind and bare(label) != "no_op" else bare(label)
