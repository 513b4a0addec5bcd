"""The form of a served run: which profile, which budget, which hardware, and everything else of a profile in `more`.

A profile is named, and read again when the run starts: what is left empty is the profile's own. What is filled in
becomes part of the profile before it is validated and admitted as any other served profile. So the form needs no rules
of its own. It is made of the profile's fields, none of which is required here.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    model_serializer,
)
from pydantic_core import CoreSchema

from profiles.hardware import shipped_targets
from profiles.load import load_profile
from profiles.schema import Budget, Fraction, Profile, Section
from tasks.operating.admission import Refused, Roots, served_profile, wrong_fields
from tasks.operating.served_profile import ServedProfile

_PERCENT = r"(100|[1-9][0-9]?(\.[0-9]+)?|0\.[0-9]*[1-9][0-9]*) ?%"
SHARE = {"type": "string", "pattern": rf"^(0?\.[0-9]*[1-9][0-9]*|1(\.0*)?|{_PERCENT})$"}
FRONT = ("layer_parameters_fraction", "speedup", "memory_fraction", "memory_gib")
_FRACTION = {key: value for key, value in TypeAdapter(Fraction).json_schema().items() if key != "type"}


class Asked(Section):
    """Values of a part of the profile, as far as somebody has filled them in."""

    @model_serializer(mode="wrap")
    def _as_filled_in(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """A field that stays empty is left out, so the form offers no `None` beside a number or a choice."""
        schema = handler(core)
        for field in handler.resolve_ref_schema(schema).get("properties", {}).values():
            field.pop("default", None)
            choices = [one for one in field.pop("anyOf", ()) if one.get("type") != "null"]
            if len(choices) == 1 and "$ref" not in choices[0]:
                field.update(choices[0])
            elif choices:  # a section of its own is opened by a switch
                field["anyOf"] = [*choices, {"type": "null"}]
            if _FRACTION.items() <= field.items():
                for key in ("type", *_FRACTION):
                    field.pop(key, None)
                field["anyOf"] = [SHARE, {"type": "number", **_FRACTION}]  # 70% is text, and the API sends numbers
                field["description"] = f"{field.get('description', '')} Write .7 or 70%.".strip()
        return schema


def _asked(name: str, about: str, fields: Mapping[str, tuple[Any, str]]) -> type[Asked]:
    optional: dict[str, Any] = {
        field: (kind | None, Field(default=None, description=told)) for field, (kind, told) in fields.items()
    }
    return create_model(name, __base__=Asked, __doc__=about, **optional)


def _fields_of(section: type[BaseModel], names: Iterable[str] | None = None) -> dict[str, tuple[Any, str]]:
    fields = section.model_fields
    return {
        name: (fields[name].rebuild_annotation(), fields[name].description or "")
        for name in names or fields
        if not fields[name].exclude
    }


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _part_of(kind: Any, told: str) -> tuple[Any, str]:
    """A section of the profile as one whose fields need not be filled in; anything else as it is."""
    if not _is_section(kind):
        return kind, told
    return _asked(f"{kind.__name__.removeprefix('Served')}Changes", told, _fields_of(kind)), told


AskedBudget: Any = _asked(
    "AskedBudget",
    "Limits that the child must keep. All empty: the profile's own. If one is given, those given are all there are.",
    _fields_of(Budget, FRONT),
)
MoreLimits: Any = _asked(
    "MoreLimits",
    "Further limits of the budget.",
    _fields_of(Budget, [name for name in Budget.model_fields if name not in FRONT]),
)


class AskedHardware(Asked):
    """What the child is made for. What is left empty is the profile's own."""

    engine: Literal["torch", "llama.cpp", "vllm", "vllm-plugin"] | None = Field(
        default=None, description="The engine that costs are measured in, on the machine of the run."
    )
    target: str | None = Field(
        default=None,
        description="Instead of an engine: hardware whose costs are modelled, not measured.",
        json_schema_extra={"enum": list(shipped_targets())},
    )
    precision: Literal["float32", "bfloat16", "float16", "float8", "q8_0"] | None = Field(
        default=None, description="Number format of the child. float8 can only be modelled; q8_0 is llama.cpp's."
    )
    threads: Annotated[int, Field(gt=0, le=4096)] | None = Field(default=None, description="Threads of one operation.")


_HARDWARE = ("must_run", "device", "kv_precision", "tensor_parallel")
_PARTS = _fields_of(ServedProfile)
MoreHardware: Any = _asked(
    "MoreHardware", "Further fields of the hardware.", _fields_of(_PARTS["hardware"][0], _HARDWARE)
)
More: Any = _asked(
    "More",
    "The rest of the profile. What is left empty is the profile's own.",
    {
        name: _part_of(kind, Profile.model_fields[name].description or "")
        for name, (kind, _) in _PARTS.items()
        if name not in ("name", "description", "budget", "hardware")
    }
    | {"limits": (MoreLimits, MoreLimits.__doc__), "hardware": (MoreHardware, MoreHardware.__doc__)},
)


def profile_asked_for(
    name: str, budget: BaseModel, hardware: BaseModel, more: BaseModel | None, roots: Roots
) -> ServedProfile:
    """The profile of that name with what was filled in. Refused where the two do not go together."""
    if name not in roots.profiles:
        raise Refused(f"profile {name!r} is none that this server offers ({', '.join(roots.profiles)})")
    tree = served_profile(load_profile(roots.profiles[name]), roots).model_dump(mode="json")
    wanted = more.model_dump(mode="json") if more else {}
    limits = budget.model_dump(mode="json") | wanted.pop("limits", {})
    machine = hardware.model_dump(mode="json") | wanted.pop("hardware", {})
    if target := machine.pop("target", None):
        if "engine" in machine:
            raise Refused(f"hardware: {target} is modelled, so no engine measures it: leave one of the two empty")
        machine |= {"engine": "roofline", "name": target}
    if limits:
        tree["budget"] = limits
    for part, values in (wanted | {"hardware": machine}).items():
        tree[part] = {**tree[part], **values} if _is_section(_PARTS[part][0]) else values
    try:
        return ServedProfile.model_validate(tree)
    except ValidationError as error:
        told = "; ".join(wrong_fields(error))
        raise Refused(f"{name} with these values is no valid profile: {told}") from error
