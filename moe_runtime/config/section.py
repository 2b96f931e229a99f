"""What every section of a run is: frozen, without unknown keys, with findings of its own."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moe_runtime.config.finding import Finding, FindingsError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen group of keys; unknown keys are mistakes, not extras."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Lax parsing, wanted for numbers that YAML reads as text, would also read `true` as 1.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise PydanticCustomError("truth_value", "a truth value stands where none belongs")
        return value

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        findings = self.findings()
        if findings:
            raise FindingsError(findings)
        return self

    def findings(self) -> list[Finding]:
        """What is wrong between the keys of this section, all of it; empty if they agree."""
        return []
