"""The JSON schema of a profile, for editors: they complete keys, show descriptions and mark what is wrong."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from profiles.schema import Profile, read_share


class _BothNotations(GenerateJsonSchema):
    """A share may be `0.7` or `70%` in YAML. Prefect's form, which has the plain schema, takes numbers."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        number = super().function_before_schema(schema)
        if schema["function"]["function"] is not read_share:
            return number
        return {"anyOf": [number, {"type": "string", "pattern": r"^\s*[0-9.]+\s*%\s*$"}]}


def editor_schema() -> dict[str, Any]:
    """See above."""
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return draft | Profile.model_json_schema(schema_generator=_BothNotations)
