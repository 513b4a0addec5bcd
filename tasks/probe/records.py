"""What is asked of a probe, and what it finds: small records, stored as JSON.

Figures of a model are by its name: `parent`, `child`, and the name of the best baseline where there is one. What is
`over_parent` is the model's figure less the parent's, paired by document.
"""

from blocks.records import Metric, ParentInfo, Value

PROBE = "probe.json"  # beside the child of a run
LEVEL = 0.025  # of a one-sided test that a figure is larger, shared among the spans or the texts


class Asked(Value):
    """How much is probed. sequences: of each text, at most. length: of the long rows, in tokens; 0 for none.
    finetune_steps, prompts: 0 for none.
    """

    sequences: int = 32
    length: int = 1024
    finetune_steps: int = 16
    finetune_sequences: int = 4
    learning_rate: float = 1e-4
    prompts: int = 40
    answer_tokens: int = 64
    seed: int = 0

    @property
    def trained_sequences(self) -> int:
        """Sequences that the fine-tuning goes through."""
        return self.finetune_steps * self.finetune_sequences


class OnDomain(Value):
    """A model on one text. times: its KL over its KL on the run's own test text; None for that text, and where that KL
    is 0. calibration: expected calibration error of the next token. The parent's KL is 0.
    """

    loss: Metric
    kl: Metric
    entropy: Metric
    calibration: Metric
    times: Metric | None = None
    loss_over_parent: Metric | None = None
    entropy_over_parent: Metric | None = None
    calibration_over_parent: Metric | None = None


class DomainFigures(Value):
    """All models on one text. about: what the text is. documents: how many of them its sequences are of."""

    name: str
    about: str
    sequences: int
    documents: int
    models: dict[str, OnDomain]


class Span(Value):
    """The loss of tokens with `first` to `last` tokens of context. growth: what a model's loss lies over the parent's
    more than with shorter contexts; empty in the first span.
    """

    first: int
    last: int
    loss: dict[str, Metric]
    over_parent: dict[str, Metric]
    growth: dict[str, Metric]


class LengthFigures(Value):
    """Loss by length of context, on rows of one document each. trained: the longest context that stages saw.

    grows_from: the first context with which the loss over the parent's is larger than with shorter ones, for certain;
    None where it is nowhere.
    """

    text: str
    about: str
    rows: int
    trained: int
    spans: tuple[Span, ...]
    grows_from: dict[str, int | None]


class Curve(Value):
    """The loss of a model on held-out text in the course of its fine-tuning. over_parent: at each of the points; empty
    for the parent. tokens_to_parent: after how many tokens it has the loss that the parent began with; None where it
    never has.
    """

    loss: tuple[Metric, ...]
    over_parent: tuple[Metric, ...] = ()
    tokens_to_parent: int | None = None


class TuningFigures(Value):
    """The same fine-tuning of every model. tokens: seen at each point of the curves."""

    text: str
    about: str
    steps: int
    learning_rate: float
    tokens: tuple[int, ...]
    models: dict[str, Curve]


class AnswerFigures(Value):
    """Greedy answers of a model beside the parent's. common: tokens until they part; quartiles: of these. never: the
    share that never parts. loops: the share that loops.
    """

    loops: Metric
    loops_over_parent: Metric | None = None
    common: Metric | None = None
    quartiles: tuple[float, float, float] | None = None
    never: Metric | None = None


class Agreement(Value):
    """The answers of all models to the same beginnings of test text."""

    prompts: int
    answer_tokens: int
    models: dict[str, AnswerFigures]


class ProbeReport(Value):
    """All that a probe found. models: their names, the parent first, then the child. notes: sentences on what was left
    out. A part that was not asked for is None.
    """

    profile: str
    parent: ParentInfo
    child_folder: str
    probed_at: str
    asked: Asked
    models: tuple[str, ...]
    domains: tuple[DomainFigures, ...]
    length: LengthFigures | None = None
    tuning: TuningFigures | None = None
    agreement: Agreement | None = None
    notes: tuple[str, ...] = ()
