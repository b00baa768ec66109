"""The base of every section of a recipe, and the error that users see. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

# Characters of a message to a user.
LONGEST_MESSAGE = 600


class UserError(Exception):
    """A mistake of the user's: launch and tool scripts print its one line and exit with code 2.

    What a message quotes comes from anywhere and has any length: beyond LONGEST_MESSAGE the middle is left out, and a
    line break is a space, so that it stays one line that can be read, with what to do at its end.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        if len(line) <= LONGEST_MESSAGE:
            return line
        return f"{line[: LONGEST_MESSAGE // 2]} … {line[3 - LONGEST_MESSAGE // 2 :]}"


# Largest image or video frame that is decoded, width x height by its header: decoded it is 192 MB.
MAX_PIXELS = 64_000_000

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
# Bounds far above any real setting: a larger value is a typo, which would only fail later.
Width = Annotated[int, Field(gt=0, le=2**16)]
Depth = Annotated[int, Field(gt=0, le=1000)]
Count = Annotated[int, Field(gt=0, le=10**9)]
Steps = Annotated[int, Field(ge=0, le=10**12)]
Part = Literal["image", "text", "temporal", "aggregation", "logit_scale", "logit_bias"]

# As the context of a dump that is compared with one of an earlier release: without `Section.later` at their defaults.
AS_BEFORE = {"later": "left out"}


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, types are strict, and values cannot change after loading.

    Strict: `true` is no number, "3" no integer and 1 no boolean. A list is what YAML and JSON have for a tuple.
    """

    # Fields that 0.1.0 did not have; their defaults mean what it did.
    later: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return values

    @classmethod
    def long_form(cls, values: Any) -> Any:
        """A section that can be written in short, as one word, in its long form."""
        return values

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        left_out = self._left_out(info.context == AS_BEFORE)
        return {name: value for name, value in values.items() if name not in left_out}

    def _left_out(self, as_before: bool) -> tuple[str, ...]:
        """Fields that a dump does not have."""
        fields = type(self).model_fields
        return tuple(name for name in self.later if getattr(self, name) == fields[name].default) if as_before else ()
