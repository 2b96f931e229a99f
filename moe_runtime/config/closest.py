"""What a mistyped word was meant to be: by slips of the hand first, by resemblance after.

One slip is a letter lost, added, wrong, or two neighbours swapped; the distance of two words is the fewest
slips that lead from one to the other (optimal string alignment). `difflib` alone was not enough: it looks for
common runs, so that it prefers a long word that holds most of the letters to a short one that is a slip away.
It ranks words at the same distance, and finds those that are too far for slips (`lr_peak` for `peak_lr`).
"""

import difflib
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

FAR = 99.0  # as many slips are counted where there are too many to be slips
_RESEMBLANCE = 0.6


def slips(word: str, other: str) -> int:
    """The fewest letters lost, added, wrong or swapped with their neighbour between two words."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, start=1):
        older, before, row = before, row, [i]
        for j, mark in enumerate(other, start=1):
            fewest = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != mark))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == mark:
                fewest = min(fewest, older[j - 2] + 1)
            row.append(fewest)
    return row[-1]


def rank(word: str, other: str) -> tuple[float, float, int] | None:
    """How far a choice is from what was typed, nearer ones first; None: it cannot have been meant.

    Upper case and dashes count as lower case and underscores. One slip in a short word is likely, two are
    not; words beyond that only have to look alike. Last, letters in another order come before other letters:
    `pd` is rather `dp` than `pp`.
    """
    typed, choice = _plain(word), _plain(other)
    limit = 1 + min(len(typed), len(choice)) // 5
    strange = sum((_letters(typed) - _letters(choice)).values())
    # Every strange letter costs a slip, and so does every letter in excess: most pairs end here.
    may_be_slips = max(strange, strange + len(choice) - len(typed)) <= limit
    distance = slips(typed, choice) if may_be_slips else limit + 1
    common = 2 * (len(typed) - strange) / max(1, len(typed) + len(choice))
    if distance > limit and common < _RESEMBLANCE:
        return None
    likeness = difflib.SequenceMatcher(None, typed, choice, autojunk=False).ratio()
    if distance <= limit:
        return (distance, -likeness, strange)
    return (FAR, -likeness, strange) if likeness >= _RESEMBLANCE else None


def closest(word: str, choices: Iterable[str]) -> list[str]:
    """The choices that may have been meant, as near as the nearest; the one most alike comes first.

    Args:
        word: what was typed.
        choices: what there is.
    """
    ranked = {choice: rank(word, choice) for choice in choices}
    likely = sorted((place, choice) for choice, place in ranked.items() if place is not None)
    return [choice for place, choice in likely if place[0] == likely[0][0][0]]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` with the likeliest choice, or nothing."""
    likely = closest(word, choices)
    return f"; did you mean {likely[0]}?" if likely else ""


@lru_cache(maxsize=1024)
def _letters(word: str) -> Counter[str]:
    return Counter(word)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
