"""What stages hand to each other and what a run reports: small frozen records, stored as JSON.

In the order of a run: inputs, recording, blocks, scores, costs, architectures, speeds, the report. Tensors are passed
as a `Ref`: a path relative to the workspace and the sha256 of the file.
"""

import statistics
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from blocks.disturbance import why_disturbed
from blocks.typed_labels import bare

Subblock = Literal["attention", "ffn"]
SUBBLOCKS: tuple[Subblock, ...] = ("attention", "ffn")
PARENT = "parent"  # its name among the models that are compared


def _relative(path: str) -> str:
    """ValueError for a path that would leave the workspace: records are also read from files of other people."""
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
        raise ValueError(f"{path!r} leaves the workspace: a path inside it, please")
    return path


RelativePath = Annotated[str, AfterValidator(_relative)]


class Value(BaseModel):
    """The frozen, strict base of all records."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Ref(Value):
    """A file and its content. `path` is relative to the workspace."""

    path: RelativePath
    sha256: str


# --- inputs


class ParentInfo(Value):
    """The parent, normalised to a Hugging Face folder inside the workspace (config.json, model.safetensors, tokenizer).

    fingerprint: sha256 over config and weights; part of every cache key. notes: remarks for the user on how it was
    read, such as its precision or tensors that were ignored.
    """

    name: str
    folder: RelativePath
    fingerprint: str
    source: str
    revision: str = ""
    notes: tuple[str, ...] = ()


class CorpusInfo(Value):
    """Packed token ids: one safetensors file with int32 `train`, `validation`, `test`, each (sequences, length).

    Beside them int64 `train_starts` and so on: how many tokens of the split come before each of its documents.
    weighted: and float32 `train_weights` and so on, (sequences, length): how much the prediction at each token counts,
    1 on average. capability: whose text it is; "" for the profile's corpus. first_image: ids from this one on are
    features of images (blocks/images.py), and none of them is a target; 0: there are none.
    """

    tokens: Ref
    fingerprint: str
    sequence_length: int
    train_sequences: int
    validation_sequences: int
    test_sequences: int
    documents: int
    description: str = ""
    weighted: bool = False
    capability: str = ""
    first_image: int = 0

    @property
    def judged_by_weight(self) -> bool:
        """Whether models are judged on its tokens by their weights. All tokens of a corpus of words count alike."""
        return self.weighted and bool(self.capability or self.first_image)

    @property
    def where(self) -> str:
        """` on retrieval`, behind what was done with the text of a capability."""
        return f" on {self.capability}" if self.capability else ""


# --- recording, blocks, scores


class LayerRecord(Value):
    """The recorded activations of one layer.

    boundary: hidden states that enter the layer, `train` (S, T, D) and `validation` (S, T, D). None where they are more
      than a shard: then they are recorded again shard by shard, where they are needed.
    statistics: Gram matrices and channel contributions, see blocks/fit.py.
    """

    layer: int
    boundary: Ref | None
    statistics: Ref
    seconds: float


class BlockRecord(Value):
    """The result of distilling one variant. Its weights lie in the block library; None for the parent and a no-op.

    nMSE = MSE(o_parent, o_variant) / MSE(o_parent, 0) on held-out tokens (Puzzle, section 3). status: "free" needed no
    training.
    """

    key: str
    layer: int
    subblock: Subblock | Literal["block"]
    variant: str
    status: Literal["trained", "free", "failed"]
    reason: str = ""
    weights: Ref | None = None
    nmse_start: float | None = None
    nmse_closed_form: float | None = None
    nmse_after: float | None = None
    tokens: int = 0
    steps: int = 0
    learning_rate: float = 0.0
    attempts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    seed: int = 0


class CapabilityScore(Value):
    """The same as in a `Score`, on the text of a capability."""

    name: str
    kl: float
    kl_se: float
    lm_loss: float
    lm_loss_se: float
    tokens: int
    kl_per_sequence: tuple[float, ...]
    lm_loss_per_sequence: tuple[float, ...]
    documents: tuple[int, ...] = ()


class Score(Value):
    """Replace-1-block score of one variant: KL(parent || child) and rise of the LM loss, nats per token.

    A coupled block has subblock "block" and the variant label "<attention>+<ffn>". The head in a type of number has
    subblock "head", layer 0 and a label such as "head@iq4_nl". Standard errors are over sequences.
    The parent's own subblock scores exactly 0. tokens: how many were scored. documents: the document that each sequence
    is of; where they are known, standard errors are over documents. capabilities: the score on each of them.
    """

    layer: int
    subblock: Subblock | Literal["block", "head"]
    variant: str
    kl: float
    kl_se: float
    lm_loss: float
    lm_loss_se: float
    tokens: int
    kl_per_sequence: tuple[float, ...]
    lm_loss_per_sequence: tuple[float, ...]
    documents: tuple[int, ...] = ()
    seconds: float = 0.0
    capabilities: tuple[CapabilityScore, ...] = ()

    def on(self, capability: str) -> CapabilityScore:
        """The figures of this score under the name of the capability whose text they are of."""
        figures = set(CapabilityScore.model_fields) - {"name"}
        return CapabilityScore(name=capability, **self.model_dump(include=figures))


# --- costs


class Cost(Value):
    """Measured cost of one variant of one subblock, at one scenario and batch size; the same in every layer.

    spread: relative standard error, that of the seconds divided by the seconds. kv_tokens: how many tokens of a
    sequence stay in its KV cache at most; None for all that the layer keeps. state_bytes: what each sequence keeps
    beside them, however long it is.
    """

    subblock: Subblock
    variant: str
    scenario: str
    batch_size: int
    prefill_seconds: float
    decode_seconds_per_token: float
    prefill_spread: float
    decode_spread: float
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int | None = None
    state_bytes: int = 0


class NonBlockCost(Value):
    """Cost of embedding, final norm and head. The search subtracts it from the budget. spread: as in a Cost.

    head: the type of number that embedding and head are in; "" for the profile's precision.
    """

    scenario: str
    batch_size: int
    prefill_seconds: float
    decode_seconds_per_token: float
    parameters: int
    weight_bytes: int
    prefill_spread: float = 0.0
    decode_spread: float = 0.0
    head: str = ""


class Calibration(Value):
    """Factors that the seconds of a cost table were multiplied by. origin: what they were fitted on."""

    prefill: float
    decode: float
    origin: str


class CostTable(Value):
    """All costs of one parent on one hardware target, either measured on it or modelled for it, never both.

    parent_measured: the whole parent, measured in the same rounds. calibration: None where the sums of blocks need
    none. load: how many processors others took meanwhile, on average. windows: how many tokens of a sequence each of
    the parent's layers keeps in its KV cache, None for all; empty where no layer slides.
    """

    hardware: dict[str, str]
    costs: tuple[Cost, ...]
    non_block: tuple[NonBlockCost, ...]
    num_hidden_layers: int
    measured_at: str
    parent_measured: tuple[NonBlockCost, ...] = ()
    calibration: Calibration | None = None
    load: float = 0.0
    windows: tuple[int | None, ...] = ()

    def kv_bytes(self, layer: int, cost: Cost, tokens: int) -> int:
        """Bytes of a variant's KV cache and state in a layer after `tokens` tokens of each sequence of the batch."""
        most = cost.kv_tokens or (self.windows[layer] if self.windows else None)
        return cost.batch_size * (cost.kv_bytes_per_token * min(tokens, most or tokens) + cost.state_bytes)

    @property
    def modelled(self) -> bool:
        """True for costs of the roofline model. The table itself says so, wherever it is copied."""
        return self.hardware.get("engine") == "roofline"

    @property
    def errors(self) -> list[float]:
        """Relative standard errors: of the parent, and of the median cost: some take hardly any time."""
        found = [spread for whole in self.parent_measured for spread in (whole.prefill_spread, whole.decode_spread)]
        for spreads in zip(*((cost.prefill_spread, cost.decode_spread) for cost in self.costs), strict=True):
            found.append(statistics.median(spreads))
        return found

    @property
    def disturbed(self) -> str:
        """Why these costs are not reliable, as a sentence for people; "" where they are."""
        return why_disturbed(self.hardware.get("busy", ""), self.errors)


# --- architectures


class LayerChoice(Value):
    """The two variants of one layer. coupled: they were distilled together, as one block."""

    attention: str = "parent"
    ffn: str = "parent"
    coupled: bool = False

    @classmethod
    def only(cls, subblock: Subblock | Literal["block"], variant: str) -> "LayerChoice":
        """A layer with this one variant. The other subblock is left out (`no_op`).

        subblock "block": the variant is that of a coupled block, "<attention>+<ffn>", and both subblocks are there.
        """
        if subblock == "block":
            attention, ffn = variant.split("+")
            return cls(attention=attention, ffn=ffn, coupled=True)
        return cls(attention=variant, ffn="no_op") if subblock == "attention" else cls(attention="no_op", ffn=variant)

    @property
    def bare(self) -> "LayerChoice":
        """The same variants without types of number: what is trained."""
        return LayerChoice(attention=bare(self.attention), ffn=bare(self.ffn), coupled=self.coupled)

    @property
    def block_label(self) -> str:
        """Variant label of the coupled block: "<attention>+<ffn>"."""
        return f"{self.attention}+{self.ffn}"


class Totals(Value):
    """Predicted costs of a whole architecture at one scenario and batch size, embedding and head included."""

    scenario: str
    batch_size: int
    prefill_seconds: float
    decode_seconds_per_token: float
    runtime_seconds: float
    tokens_per_second: float
    memory_bytes: int
    parameters: int


class AtBatchSize(Value):
    """A child and its parent at one batch size of a scenario, predicted. broken, parent_broken: which limits of the
    budget they do not keep there. reliable: False where the costs were measured on a busy machine.
    """

    child: Totals
    parent: Totals
    chosen: bool
    broken: tuple[str, ...]
    parent_broken: tuple[str, ...]
    reliable: bool


class Architecture(Value):
    """One variant per subblock per layer, with its predicted score and costs, and the solver's proof.

    evaluations: how many whole architectures were evaluated to find it; 0 for a solver that evaluates none. head: the
    type of number of embedding and head; "" for the profile's precision.
    """

    method: str
    layers: tuple[LayerChoice, ...]
    score: float
    score_se: float
    totals: tuple[Totals, ...]
    parent_totals: tuple[Totals, ...]
    status: str
    bound: float
    gap: float
    solved_by: str = ""
    solve_seconds: float = 0.0
    evaluations: int = 0
    head: str = ""

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch size of each scenario."""
        return tuple(totals.batch_size for totals in self.totals)


# --- measured figures and speeds


class Metric(Value):
    """A measured figure, its standard error and the size of the sample."""

    value: float
    se: float
    n: int


class TruthPoint(Value):
    """An architecture by name: its predicted score (the sum of block scores) and that of the assembled model."""

    name: str
    predicted: float
    true: float
    true_se: float = 0.0


class Turn(Value):
    """One request of one model, in seconds: wall and CPU of the prefill and of one decode step (B tokens)."""

    prefill: float
    step: float
    prefill_cpu: float
    step_cpu: float


class Gains(Value):
    """The parent's time divided by the model's, paired by round; above 1 the model is faster. Wall and CPU time."""

    prefill: Metric
    decode: Metric
    request: Metric
    prefill_cpu: Metric
    decode_cpu: Metric


class Throughput(Value):
    """One model end to end at one scenario and batch size: medians over the rounds, standard errors from the rounds.

    first_token_seconds (TTFT): the prefill of the batch. output_token_seconds (TPOT): one decode step of the batch, in
    the middle of the generation. runtime_seconds: a whole request, prompt and all generated tokens; cpu_seconds: the
    same in CPU time, which leaves out the load of other processes. generated_tokens_per_second: throughput of the
    batch. requests_per_second: that divided by the tokens generated per request. memory_bytes: at peak, None where it
    is not known. gains: over the parent.
    """

    scenario: str
    batch_size: int
    prefill_tokens_per_second: Metric
    decode_tokens_per_second: Metric
    first_token_seconds: Metric
    output_token_seconds: Metric
    prefill_cpu_seconds: Metric
    step_cpu_seconds: Metric
    runtime_seconds: Metric
    cpu_seconds: Metric
    generated_tokens_per_second: Metric
    requests_per_second: Metric
    memory_bytes: int | None = None
    gains: Gains | None = None

    @property
    def errors(self) -> list[float]:
        """Relative standard errors of the times, and of the gains over the parent."""
        metrics = [self.first_token_seconds, self.output_token_seconds, self.runtime_seconds]
        metrics += [self.gains.prefill, self.gains.decode, self.gains.request] if self.gains else []
        return [metric.se / metric.value for metric in metrics if metric.value]


class SumCheck(Value):
    """The predicted time of one model in one phase beside the measured one. Predicted: the sum over all its parts.

    off: predicted / measured - 1. gain_off: the same of the gain over the parent, which does not change when the
    machine becomes slower between the two measurements; None for the parent. The errors of both measurements are
    included.
    """

    model: str
    scenario: str
    batch_size: int
    phase: Literal["prefill", "decode"]
    predicted_seconds: float
    measured_seconds: Metric
    off: Metric
    gain_off: Metric | None = None


class SpeedReport(Value):
    """Speeds of all models, by name, in the engine that the costs come from, and how well the costs predicted them.

    clock: the time that predictions are compared in, "CPU" or "wall". busy: which other programs computed meanwhile,
    "" for none; load: how many processors those took on average. measured_at: when, ISO 8601. A report without models:
    nothing was measured, because the costs are modelled.
    """

    engine: str = ""
    clock: str = ""
    busy: str = ""
    load: float = 0.0
    measured_at: str = ""
    calibration: Calibration | None = None
    models: dict[str, tuple[Throughput, ...]] = {}
    sums: tuple[SumCheck, ...] = ()

    @property
    def errors(self) -> list[float]:
        """Relative standard errors of all models' times and gains."""
        return [error for every in self.models.values() for own in every for error in own.errors]

    @property
    def disturbed(self) -> str:
        """Why these speeds are not reliable, as a sentence for people; "" where they are."""
        return why_disturbed(self.busy, self.errors)


# --- the report


class Answer(Value):
    """A greedy answer. ended: the model ended it itself. chat: the prompt was put into the tokenizer's chat template.

    repetition: share of the runs of four tokens that occurred earlier in the answer. loops: see
    tasks/evaluate/answers.py.
    """

    prompt: str
    chat: bool
    text: str
    tokens: int
    ended: bool
    repetition: float
    loops: bool


class Looping(Value):
    """Whether a model looped (1) or not (0) on each of some beginnings of test text, and the document of each."""

    loops: tuple[int, ...]
    documents: tuple[int, ...]


class RightAnswers(Value):
    """Whether what a model said to each of some questions of a capability was the known answer (1) or not (0), and the
    document of each. distances: how many tokens back the answer stands in the prompt; empty where answers are no codes.
    """

    right: tuple[int, ...]
    documents: tuple[int, ...]
    distances: tuple[int, ...] = ()


class LimitKept(Value):
    """One limit of the budget, by the profile's name, and what a model takes of it.

    asked, got, measured: in the unit of the limit (GiB, s, tokens/s, or a share or multiple of the parent's).
    floor: True when `asked` is the least that is allowed, False when it is the most.
    got: what the search reckoned with: bytes and parameters are counted, a time is the sum of the blocks' costs.
    measured: a time of the whole model. None for bytes and parameters, and where the model was not timed.
    """

    name: str
    asked: float
    floor: bool
    got: float
    timed: bool = False
    measured: Metric | None = None


class Floor(Value):
    """The highest KL on a capability, and what a chosen child has before GKD (tasks/evaluate/floors.py).

    asked: by the profile. limit: what the search was asked, so that the child itself keeps it. predicted: its sum of
    scores. at_most: a one-sided bound of what was measured, None for a single document. All in nats per token.
    """

    capability: str
    asked: float
    limit: float
    predicted: float
    measured: Metric
    at_most: float | None


class HeldTime(Value):
    """A limit of the budget on time, and what a chosen child takes of it before GKD, timed in turns with its parent
    (tasks/evaluate/floors.py).

    field: of the budget (`speedup`, `max_latency_seconds of chat`). name: the same with the scenario it was timed in,
    where the budget holds in several. floor: True when `asked` is the least that is allowed. asked: by the profile.
    limit: what the search was asked, so that the child itself keeps it. predicted: by the costs of its blocks.
    at_worst: the one-sided bound of `measured` by which the limit is held, None for a single round. All in the unit of
    the limit.
    """

    field: str
    name: str
    floor: bool
    asked: float
    limit: float
    predicted: float
    measured: Metric
    at_worst: float | None = None


class SeenItems(Value):
    """Which of the drawn items of each benchmark stand in text that the child was made with: 1 or 0 per item, in the
    order of `Candidate.correct`. short: how many of its items are too short to be looked for (tasks/evaluate/seen.py).
    """

    seen: dict[str, tuple[int, ...]]
    short: dict[str, int]


class OnCapability(Value):
    """A model on the test sequences of a capability. predicted_kl: the sum of scores, before GKD. samples and
    documents: as in a Candidate.
    """

    loss: Metric
    kl: Metric
    top1_agreement: Metric
    predicted_kl: float | None = None
    samples: dict[str, tuple[float, ...]] = {}
    documents: tuple[int, ...] = ()


class Candidate(Value):
    """A model of the final table: the parent, the child or a baseline, before or after GKD.

    samples: loss, kl, top1_agreement of each test sequence. sample_documents: the document that each is of;
    sequences of one document are not independent of each other. correct: 0 or 1 per item of each benchmark; items
    with the same number in item_groups are on the same text. Sequences and items are the same for all candidates,
    so two candidates are compared in pairs. layers: the variants of each layer. answers: only the parent and the
    finished child have some. limits: the budget, and what the model takes of it. gkd_kept_start: the KL on the
    validation text before GKD, where no step of GKD lowered it. All of these are empty in reports of older
    versions. file_bytes: of the GGUF file that it is served from, where there is one; else 0. rounded_kl: on
    validation text before and after the training that knows the rounding. capabilities: the same figures on each.
    looping: of the parent, the finished child and the best baseline, where the profile asks for a count.
    right_answers: likewise, on each capability with known answers. cache: the type of llama.cpp's KV cache, where
    loss, kl and top1_agreement are llama.cpp's own with such a cache; else they are torch's. unseen,
    unseen_retention: the accuracy on each benchmark, and the retention, without the items that stand in text that
    the child was made with, where any do.
    """

    name: str
    stage: Literal["parent", "assembled", "distilled"]
    parameters: int
    weight_bytes: int
    memory_bytes: int
    prefill_tokens_per_second: Metric | None = None
    decode_tokens_per_second: Metric | None = None
    runtime_seconds: Metric | None = None
    loss: Metric | None = None
    kl: Metric | None = None
    top1_agreement: Metric | None = None
    benchmarks: dict[str, Metric] = {}
    retention: Metric | None = None
    unseen: dict[str, Metric] = {}
    unseen_retention: Metric | None = None
    predicted_kl: float | None = None
    gkd_tokens: int = 0
    gkd_kept_start: float | None = None
    rounded_kl: tuple[float, float] | None = None
    gains: Gains | None = None
    layers: tuple[LayerChoice, ...] = ()
    samples: dict[str, tuple[float, ...]] = {}
    sample_documents: tuple[int, ...] = ()
    correct: dict[str, tuple[int, ...]] = {}
    item_groups: dict[str, tuple[int, ...]] = {}
    answers: tuple[Answer, ...] = ()
    limits: tuple[LimitKept, ...] = ()
    file_bytes: int = 0
    cache: str = ""
    capabilities: dict[str, OnCapability] = {}
    looping: Looping | None = None
    right_answers: dict[str, RightAnswers] = {}


class StageTime(Value):
    """The time of one stage of a run: wall seconds, and CPU seconds of all threads of the process."""

    name: str
    seconds: float
    cpu_seconds: float


class Racer(Value):
    """An architecture that raced: its place by summed score from 1, how many layers differ from the first one's, and
    (steps of GKD, KL on validation text) at the end of each round that it was in.
    """

    place: int
    score: float
    different: int
    kl: tuple[tuple[int, float], ...]


class ChildReport(Value):
    """The result of a run: parent, child and baselines, predicted and measured.

    request: what was asked of the search (tasks/search/request.py). rule: when one child counts as better than another
    (`champion` in the profile). race: best first, empty where there was none. batch_sizes: what else could have been
    served at a time, where a scenario names several sizes. floors, held_times: the limits on capabilities and on time
    that the chosen child was measured for. seen_items: None where no benchmarks were asked.
    finished_at, command: when the run ended, and the command that makes the child again.
    All are empty in reports of older versions.
    """

    profile: str
    parent: ParentInfo
    corpus: CorpusInfo
    architecture: Architecture
    candidates: tuple[Candidate, ...]
    child_folder: RelativePath
    speed: SpeedReport = SpeedReport()
    failed_variants: tuple[str, ...] = ()
    stages: tuple[StageTime, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    prefect_run_id: str = ""
    mlflow_run_id: str = ""
    request: dict[str, Any] = {}
    rule: dict[str, Any] = {}
    race: tuple[Racer, ...] = ()
    batch_sizes: tuple[AtBatchSize, ...] = ()
    floors: tuple[Floor, ...] = ()
    held_times: tuple[HeldTime, ...] = ()
    seen_items: SeenItems | None = None
    finished_at: str = ""
    command: str = ""
