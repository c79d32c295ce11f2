"""`response_format`: what an answer must be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ANY_OBJECT = {"type": "object"}


class RequestPart(BaseModel):
    """An object in a request. Null is as good as left out, for fields that are not known, too: some clients send all
    that they know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class TextFormat(RequestPart):
    type: Literal["text"]

    @property
    def json_of(self) -> Any:
        return None


class AnyObjectFormat(RequestPart):
    """Other servers take a schema here, too."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = ANY_OBJECT

    @property
    def json_of(self) -> Any:
        return self.schema_


class NamedSchema(RequestPart):
    """`name` and `strict` change nothing: an answer always follows its schema."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = ANY_OBJECT
    strict: bool | None = None


class SchemaFormat(RequestPart):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def json_of(self) -> Any:
        return self.json_schema.schema_


# `json_of` of each is the schema of the JSON that the answer is; None where it is any text.
AnswerFormat = Annotated[TextFormat | AnyObjectFormat | SchemaFormat, Field(discriminator="type")]
