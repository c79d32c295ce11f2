"""`response_format`: what an answer must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

ANY_OBJECT = {"type": "object"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextFormat(_Part):
    type: Literal["text"]

    @property
    def json_of(self) -> Any:
        return None


class AnyObjectFormat(_Part):
    """Other servers take a schema here, too."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = ANY_OBJECT

    @property
    def json_of(self) -> Any:
        return self.schema_


class NamedSchema(_Part):
    """`name` and `strict` change nothing: an answer always follows its schema."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = ANY_OBJECT
    strict: bool | None = None


class SchemaFormat(_Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def json_of(self) -> Any:
        return self.json_schema.schema_


# `json_of` of each is the schema of the JSON that the answer is; None where it is any text.
AnswerFormat = Annotated[TextFormat | AnyObjectFormat | SchemaFormat, Field(discriminator="type")]
