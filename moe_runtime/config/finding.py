"""A single mistake in a config, and the small number lore that suggests a better choice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        key: dotted path of the key, relative to the section or to the run, as the finder knows it.
        text: what was expected, what was got and what to do.
    """

    key: str
    text: str

    @classmethod
    def expected(cls, key: str, wanted: str, got: object) -> Self:
        """The common form: expected this, got that."""
        return cls(key, f"expected {wanted}, got {got}")


class FindingsError(ValueError):
    """Carries several findings through a pydantic validator, which lets one exception out."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(f"{finding.key}: {finding.text}" for finding in findings))
        self.findings = tuple(findings)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def nearest(wanted: int, valid: Iterable[int], count: int = 2) -> str:
    """The valid choices closest to the wanted one, ascending, as text: `4, 8`."""
    closest = sorted(valid, key=lambda choice: (abs(choice - wanted), choice))[:count]
    return ", ".join(str(choice) for choice in sorted(closest)) or "none"
