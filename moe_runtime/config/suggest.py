"""The key that was meant by one that is not there: a slip, another section's, or another program's name."""

from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from moe_runtime.config.closest import FAR, rank
from moe_runtime.config.other_names import OTHER_NAMES
from moe_runtime.config.schema import RunConfig

KeyPath = tuple[str, ...]
_MOST = 3
# A slip within the section that was named is likelier than one that goes to another as well.
_ELSEWHERE = 0.5  # slips
_ALIKE_ELSEWHERE = 0.8
_WHOLE_SLIPS = 2  # in a whole dotted key, lost and added dots among them


@lru_cache(maxsize=4096)
def section_at(path: KeyPath) -> type[BaseModel] | None:
    """The section class under a key path, or None where no section is."""
    section: type[BaseModel] | None = RunConfig
    is_one_of = False  # the next part is the name, or the number, of one of several sections
    for part in path:
        if is_one_of:
            is_one_of = False
            continue
        info = section.model_fields.get(part) if section is not None else None
        section = section_of(info.annotation) if info is not None else None
        is_one_of = info is not None and several(info.annotation) is not None
    return None if is_one_of else section


def several(annotation: Any) -> str | None:
    """What stands for one of the sections of a field that has several: NAME, or N in a list; else None."""
    if section_of(annotation) is None:
        return None
    return {dict: "NAME", tuple: "N", list: "N"}.get(get_origin(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in the annotation of a field, or None if its values are no sections."""
    choices = (annotation, *get_args(annotation))
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def key_paths(start: KeyPath = ()) -> Iterator[KeyPath]:
    """All keys of a run, those of sections too, each section before its keys.

    Where there may be several sections under a key (`data.mixture`), NAME or N stands for any of them.
    """
    section = section_at(start)
    for name, info in section.model_fields.items() if section is not None else ():
        yield (*start, name)
        one = several(info.annotation)
        yield from key_paths((*start, name) if one is None else (*start, name, one))


@cache
def _all_keys() -> tuple[KeyPath, ...]:
    return tuple(key_paths())


def suggest_key(path: KeyPath, value: Any = None) -> str:
    """`; did you mean X?` for an unknown key, where nothing comes near the keys of its section.

    Args:
        path: the key; all of it but the last word is a section.
        value: what it was set to. A section of a single key is that key's, as an override makes it, and
            so on inwards.
    """
    section = section_at(path[:-1])
    if section is None:
        return ""
    inner = _chain(value)
    keys = _whole((*path, *inner)) if inner or not _is_slip(path, section) else []
    if not keys:
        keys = meant_by(path)
        for word in inner:
            keys = [_inner(key, word) for key in keys]
    if keys:
        names = ", ".join(".".join(key) for key in keys)
        return f"; did you mean {' or '.join(names.rsplit(', ', 1))}?"
    where = f" of {'.'.join(path[:-1])}" if path[:-1] else ""
    return f"; keys{where}: {', '.join(section.model_fields)}"


def _chain(value: Any) -> KeyPath:
    """The keys from a section of one key inwards, down to the first that holds anything else."""
    words: list[str] = []
    while isinstance(value, dict) and len(value) == 1:
        word, value = next(iter(value.items()))
        words.append(str(word))
    return tuple(words)


def _is_slip(path: KeyPath, section: type[BaseModel]) -> bool:
    """True where a key of the section that was named is one slip away."""
    places = (rank(path[-1], name) for name in section.model_fields)
    return any(place is not None and place[0] <= 1 for place in places)


def _whole(typed: KeyPath) -> list[KeyPath]:
    """The keys that are a slip or two away as a whole: in a section's name, in its key, or in a dot."""
    word = ".".join(typed)
    found: dict[str, KeyPath] = {}
    for key in _all_keys():
        named = _named_as(key, typed)
        if abs(len(".".join(named)) - len(word)) <= _WHOLE_SLIPS:
            found[".".join(named)] = named
    near = sorted((place, name) for name in found if (place := _whole_place(word, name)) is not None)
    return [found[name] for place, name in near if place == near[0][0]][:_MOST]


def _named_as(key: KeyPath, typed: KeyPath) -> KeyPath:
    """A key with NAME and N replaced by what was typed in their places."""
    if len(key) != len(typed):
        return key
    return tuple(word if part in ("NAME", "N") else part for part, word in zip(key, typed, strict=True))


def _whole_place(word: str, name: str) -> tuple[float, float, int] | None:
    place = rank(word, name)
    return place if place is not None and place[0] <= _WHOLE_SLIPS else None


def meant_by(path: KeyPath) -> list[KeyPath]:
    """The keys that may be meant by an unknown one: the likeliest, and those that are as likely."""
    section = section_at(path[:-1])
    own = [(*path[:-1], name) for name in section.model_fields] if section is not None else []
    keys = [*own, *(key for key in _all_keys() if section_at(key[:-1]) is not section)]
    ranked = sorted((place, key) for key in keys if (place := _place(path, key)) is not None)
    other = OTHER_NAMES.get(path[-1].lower())
    if other is not None and not (ranked and ranked[0][0][0] <= 1):
        return [tuple(other.split("."))]
    return [key for place, key in ranked if place == ranked[0][0]][:_MOST]


def _place(path: KeyPath, key: KeyPath) -> tuple[float, float, int] | None:
    """How far a key is from what was typed; those of other sections have to be more alike."""
    place = rank(path[-1], key[-1])
    if place is None or key[:-1] == path[:-1]:
        return place
    distance, likeness, letters = place
    if distance == FAR and -likeness < _ALIKE_ELSEWHERE:
        return None
    return (distance + _ELSEWHERE, likeness, letters)


def _inner(section: KeyPath, word: str) -> KeyPath:
    """The key in a section that is meant by a word; the section itself where none comes near."""
    inner = section_at(section)
    if inner is None:
        return section
    if word in inner.model_fields:
        return (*section, word)
    near = [key for key in meant_by((*section, word)) if key[:-1] == section]
    return near[0] if near else section
