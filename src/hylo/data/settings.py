"""What training reads, as a recipe says it: sources, how they are mixed, and how documents become rows."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

STANDARD_LIBRARY = "python-stdlib"

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Column = Annotated[str, Field(min_length=1)]


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(_Source):
    """Files, folders (their .txt, .md, .rst and .py files) or python-stdlib; every file is a document."""

    kind: Literal["text"] = "text"
    paths: list[str] = Field(min_length=1)
    weight: Weight | None = Field(None, description="of the rows, beside the other sources' weights; by tokens if none")

    @property
    def preferences(self) -> bool:
        return False

    def resolved(self, folder: Path) -> Self:
        paths = [path if path == STANDARD_LIBRARY else str((folder / path).resolve()) for path in self.paths]
        return self.model_copy(update={"paths": paths})


class _Records(_Source):
    """Documents in the fields of records: one text; a conversation; a question and its answer; or a preference.

    Conversations (lists of {"role", "content"} or {"from", "value"}) and questions go through the tokenizer's chat
    template. Of `chosen` and `rejected` answers nothing is read but by the objective dpo.
    """

    text: Column | None = None
    messages: Column | None = None
    prompt: Column | None = None
    answer: Column | None = None
    chosen: Column | None = None
    rejected: Column | None = None
    weight: Weight | None = Field(None, description="of the rows, beside the other sources' weights; by tokens if none")

    @property
    def preferences(self) -> bool:
        return self.chosen is not None

    @property
    def columns(self) -> list[str]:
        named = (self.text, self.messages, self.prompt, self.answer, self.chosen, self.rejected)
        return [name for name in named if name is not None]

    @model_validator(mode="before")
    @classmethod
    def _text_by_default(cls, values: Any) -> Any:
        fields = ("text", "messages", "prompt", "answer", "chosen", "rejected")
        if isinstance(values, dict) and all(values.get(field) is None for field in fields):
            return values | {"text": "text"}
        return values

    @model_validator(mode="after")
    def _is_one_form(self) -> Self:
        given = {
            field for field in ("text", "messages", "prompt", "answer", "chosen", "rejected") if getattr(self, field)
        }
        forms: list[set[str]] = [{"text"}, {"messages"}, {"prompt", "answer"}, {"prompt", "chosen", "rejected"}]
        if given not in forms:
            raise ValueError(
                "name the fields of one form: text; messages; prompt and answer; or prompt, chosen and rejected; "
                f"got {', '.join(sorted(given))}"
            )
        if self.preferences and self.weight is not None:
            raise ValueError("preferences are read by the objective dpo alone and have no weight; leave it out")
        return self


class _RecordFiles(_Records):
    paths: list[str] = Field(min_length=1)

    def resolved(self, folder: Path) -> Self:
        return self.model_copy(update={"paths": [str((folder / path).resolve()) for path in self.paths]})


class JsonlSource(_RecordFiles):
    """Files of one JSON object a line, or folders of .jsonl files."""

    kind: Literal["jsonl"]


class ParquetSource(_RecordFiles):
    """Parquet files, or folders of them."""

    kind: Literal["parquet"]


class HubSource(_Records):
    """A data set of the Hugging Face Hub, or the directory of a local copy, through datasets.load_dataset."""

    kind: Literal["hub"]
    dataset: Annotated[str, Field(min_length=1)]
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="branch, tag or commit; the newest if left out")

    def resolved(self, folder: Path) -> Self:
        local = folder / self.dataset
        return self.model_copy(update={"dataset": str(local.resolve())}) if local.is_dir() else self


class RetrievalSource(_Source):
    """Synthetic retrieval: rows of the other sources' text with facts planted in it (hylo.data.retrieval)."""

    kind: Literal["retrieval"]
    share: float = Field(gt=0, le=1, description="of all rows")


RecordSource = JsonlSource | ParquetSource | HubSource
DocumentSource = TextSource | JsonlSource | ParquetSource | HubSource
Source = Annotated[DocumentSource | RetrievalSource, Field(discriminator="kind")]
HeldOut = Annotated[DocumentSource, Field(discriminator="kind")]


class Data(BaseModel):
    """The sources of a run. `{text: [...], facts: 0.5}` is short for a text source and a retrieval source.

    Raises pydantic.ValidationError on unknown keys, on values out of range and on sources that contradict each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[Source] = Field(min_length=1)
    held_out: list[HeldOut] = Field(
        [], description="to evaluate on; if left out a twentieth of the sources is set aside"
    )
    boundaries: bool = Field(True, description="documents that share a row do not see each other; false: as published")
    epochs: int = Field(1, gt=0, description="times that a stage may read its part of the sources")
    seed: int = Field(0, ge=0, description="of the documents' order")

    @property
    def documents(self) -> list[DocumentSource]:
        """The sources that rows are packed from."""
        return [s for s in self.sources if not isinstance(s, RetrievalSource) and not s.preferences]

    @property
    def preferences(self) -> list[RecordSource]:
        return [s for s in self.sources if not isinstance(s, RetrievalSource | TextSource) and s.preferences]

    @property
    def facts(self) -> float:
        """Share of rows that carry synthetic retrieval."""
        return sum(source.share for source in self.sources if isinstance(source, RetrievalSource))

    def resolved(self, folder: Path) -> "Data":
        """The same with paths taken from `folder`."""
        sources = [s if isinstance(s, RetrievalSource) else s.resolved(folder) for s in self.sources]
        return self.model_copy(
            update={"sources": sources, "held_out": [source.resolved(folder) for source in self.held_out]}
        )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if "text" in values or "facts" in values:
            if "sources" in values:
                raise ValueError("text and facts are short for sources; write either these or sources")
            text, facts = values.pop("text", []), values.pop("facts", 0)
            values["sources"] = [{"kind": "text", "paths": text}]
            if facts != 0:
                values["sources"].append({"kind": "retrieval", "share": facts})
        if isinstance(values.get("held_out"), list):
            values["held_out"] = [
                {"kind": "text", "paths": [item]} if isinstance(item, str) else item for item in values["held_out"]
            ]
        return values

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        weighted = [source.weight is not None for source in self.documents]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"source {weighted.index(False)} of {len(weighted)} has no weight; give all of them one, or none"
            )
        if self.facts > 1:
            raise ValueError(f"the shares of retrieval come to {self.facts:g}; they must not exceed 1")
        if self.facts and not self.documents:
            raise ValueError("retrieval is planted in text; name a source of text beside it")
        if any(source.preferences for source in self.held_out):
            raise ValueError("held_out text is for evaluation; preferences cannot be held out")
        return self


def source_name(source: DocumentSource) -> str:
    """What a source is called in messages and tables."""
    if isinstance(source, HubSource):
        return f"hub {source.dataset}" + (f" ({source.config})" if source.config else "")
    return f"{source.kind} {', '.join(source.paths)}"
