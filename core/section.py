"""What all parts of the configuration are made of: kinds of numbers, and a strict, frozen section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the tree: frozen, strict about types, no unknown keys, no infinite numbers; the docstring under a field
    is its meaning.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
