"""Where tokens come from: one prepared set, or several in given shares."""

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Count, Fraction, NonNegative, Section

SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]


class TextForm(Section):
    """Which text of a line of JSON (or a row of Parquet) is read, and which of it is trained on."""

    fields: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        ("text",),
        description="keys whose text is joined, in this order; messages: a list of role and content",
    )
    loss_on: tuple[str, ...] | None = Field(
        None,
        description="fields, or roles of messages, whose tokens are targets; null: all fields, or assistant",
    )
    message_format: str = Field(
        "{role}: {content}\n", description="a message as text; what comes before {content} is never a target"
    )

    def findings(self) -> list[Finding]:
        """Masked fields are among the fields; a message has a place for its content."""
        found = []
        if "messages" not in self.fields:
            strange = [name for name in self.loss_on or () if name not in self.fields]
            if strange:
                found.append(Finding.expected("loss_on", f"some of {', '.join(self.fields)}", strange[0]))
        elif len(self.fields) > 1:
            found.append(Finding.expected("fields", "messages alone, or other fields", list(self.fields)))
        if self.message_format.count("{content}") != 1:
            found.append(Finding.expected("message_format", "{content} once", repr(self.message_format)))
        return found


class MixtureSet(Section):
    """One prepared set of a mixture."""

    path: str = Field(description="folder of token shards; prepared there when missing and `source` is set")
    weight: NonNegative = Field(
        1.0, description="its share of the sequences, over the sum of all weights; 0: validated only"
    )
    source: str | None = Field(None, description="as data.source, for this set")
    fim_rate: Fraction | None = Field(None, description="as data.fim_rate, for this set; null: that one")
    form: TextForm | None = Field(None, description="as data.form, for this set; null: that one")


class DataConfig(Section):
    """Where tokens come from: `path` or `mixture`."""

    path: str | None = Field(
        None, description="folder of token shards; prepared there when missing and `source` is set"
    )
    source: str | None = Field(
        None, description="builtin:stdlib, dir:PATH, glob:PATTERN or a .txt/.jsonl/.parquet file"
    )
    mixture: dict[SetName, MixtureSet] = Field(
        {}, description="instead of path: prepared sets by name, read in the shares of their weights"
    )
    tokenizer: str = Field("byte", description="byte, bpe:N, deepseek, or a tokenizer.json")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = Field(0.05, description="of documents")
    fim_rate: Fraction = Field(0.0, description="share of documents rewritten prefix-suffix-middle")
    form: TextForm = TextForm()
    document_mask: bool = Field(False, description="attend within a document only")
    bad: Literal["stop", "skip"] = Field(
        "stop", description="an id that the model has no row for: end the run, or skip the step that read it"
    )
    skip: tuple[tuple[Count, PositiveInt], ...] = Field(
        (), description="[first, count] of sequences, numbered from the start of training, to pass over"
    )

    @field_validator("mixture", mode="before")
    @classmethod
    def _list_has_names(cls, value: Any) -> Any:
        """A list of sets is taken too: each is called by its `name`, else by the folder it lies in."""
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            return value
        named = [
            (str(item.get("name") or PurePath(str(item.get("path", place))).name), item)
            for place, item in enumerate(value)
        ]
        names = [name for name, _ in named]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            text = f"two sets are called {twice}; give each a name of its own"
            raise PydanticCustomError("set_names", "{text}", {"text": text})
        return {name: {key: item[key] for key in item if key != "name"} for name, item in named}

    def findings(self) -> list[Finding]:
        """One source of tokens, and something in it to train on."""
        if not self.mixture:
            return [] if self.path is not None else [Finding("path", "set data.path, or data.mixture")]
        found = []
        for key in ("path", "source"):
            if getattr(self, key) is not None:
                text = f"is for a single set; give each set of data.mixture its {key} and leave this out"
                found.append(Finding(key, text))
        if not any(one.weight > 0 for one in self.mixture.values()):
            found.append(Finding.expected("mixture", "a set with a weight above 0", "none"))
        return found

    def claims(self, name: str) -> frozenset[str] | None:
        """Keys by which the prepared set `name` is judged; None: all.

        A set of a mixture that is not to be prepared here is taken as it was made, but for its tokenizer and
        what is said of it.
        """
        one = self.mixture.get(name)
        if one is None or one.source is not None:
            return None
        said = [key for key in ("fim_rate", "form") if getattr(one, key) is not None]
        return frozenset(["tokenizer", *said])

    def sets(self) -> dict[str, "DataConfig"]:
        """Each prepared set as a config of its own, by name; the one of `path` has the name ''."""
        if not self.mixture:
            return {"": self}
        common = self.model_dump(exclude={"mixture", "path", "source"})
        return {
            name: DataConfig.model_validate(common | self._own(one)) for name, one in self.mixture.items()
        }

    def _own(self, one: MixtureSet) -> dict[str, Any]:
        own = one.model_dump(exclude={"weight"})
        return {key: value for key, value in own.items() if value is not None}
