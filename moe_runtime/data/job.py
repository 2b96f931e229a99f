"""The work of one preparation in its folder: begun, gone on with, or done by several processes.

    work/plan.json        what was asked, of which files; another plan begins anew
    work/survey/          hashes of each chunk; fates of all documents
    work/tokenizer.json   where it had to be trained
    work/pieces/          ids of each chunk

Whatever is there under its last name is whole, so a killed preparation goes on at the chunks that are
missing. Any number of processes, at any time, writes the same bytes.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_runtime.config.data import TextForm
from moe_runtime.data.sources import Chunk, Source, open_source
from moe_runtime.data.survey import Survey, is_surveyed, survey_chunk
from moe_runtime.data.task import Request, Tick
from moe_runtime.data.tokenise import is_tokenised, tokenise_chunk
from moe_runtime.data.tokenizer import load_tokenizer
from moe_runtime.data.vocabulary import Tokenizer

FORMAT = 1
PLAN = "plan.json"
SURVEY, TOKENISE = "reading", "tokenising"  # the two passes over all chunks, as progress names them


@dataclass(frozen=True)
class Job:
    """What a process needs to do its share.

    Args:
        request: what is to be prepared.
        work: the folder of the preparation.
        survey: what the first pass found; None before.
    """

    request: Request
    work: Path
    survey: Survey | None = None

    @cached_property
    def source(self) -> Source:
        """Files are listed in the plan: this one is for its name and its form."""
        return open_source(self.request.source, self.request.form)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the second pass."""
        return load_tokenizer(self.work / "tokenizer.json", self.request.tokenizer)

    @property
    def surveys(self) -> Path:
        """Where the first pass writes."""
        return self.work / "survey"

    @property
    def pieces(self) -> Path:
        """Where the second pass writes."""
        return self.work / "pieces"

    def do(self, what: str, index: int, chunk: Chunk, tick: Tick) -> None:
        """One chunk of one pass.

        Raises:
            DataError: the source is not usable.
            OSError: the disk is not.
        """
        if what == SURVEY:
            survey_chunk(self.source, chunk, index, self.surveys, tick)
            return
        assert self.survey is not None, "the survey comes first"
        tokenise_chunk(
            self.source, chunk, index, self.survey, self.tokenizer, self.request, self.pieces, tick
        )

    def is_done(self, what: str, index: int) -> bool:
        """A chunk of a pass is whole."""
        return is_surveyed(index, self.surveys) if what == SURVEY else is_tokenised(index, self.pieces)

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        request = asdict(replace(self.request, form=TextForm())) | {"form": self.request.form.model_dump()}
        survey = None if self.survey is None else asdict(replace(self.survey, folder=str(self.survey.folder)))  # type: ignore[arg-type]
        return {"request": request, "work": str(self.work), "survey": survey}


def job_from(fields: dict[str, Any]) -> Job:
    """What `to_json` gave."""
    survey = fields["survey"]
    if survey is not None:
        survey = Survey(
            Path(survey["folder"]), tuple(survey["firsts"]), survey["num_bytes"], survey["counts"]
        )
    return Job(_request_from(fields["request"]), Path(fields["work"]), survey)


def _request_from(fields: dict[str, Any]) -> Request:
    return Request(**(fields | {"form": TextForm.model_validate(fields["form"])}))


def plan_digest(request: Request, chunks: list[Chunk]) -> str:
    """What a preparation depends on: the request, and every file's place, size and time of change."""
    digest = hashlib.sha256(json.dumps([FORMAT, repr(request)]).encode())
    for chunk in chunks:
        for part in chunk:
            status = Path(part.file).stat()
            digest.update(repr((*part, status.st_size, status.st_mtime_ns)).encode())
    tokenizer = Path(request.tokenizer)
    if tokenizer.is_file():
        digest.update(tokenizer.read_bytes())
    return digest.hexdigest()
