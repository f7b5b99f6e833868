"""Writes an exact teacher cache (hylo.distill.cache): the teacher runs once over the rows of an extension stage.

A cache grows in OUT.partial, which a further call of the same command goes on with, and becomes OUT when it is whole. A
shard is written aside, flushed, renamed, and then noted in shards.jsonl with its checksum: what a killed run leaves is
whole shards, and at most one that nobody has noted and that is written again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, PreTrainedModel

from hylo.checkpoint import model_hash
from hylo.distill.batch import model_inputs
from hylo.distill.cache import (
    MANIFEST,
    CacheRecipe,
    Manifest,
    Shard,
    VectorType,
    file_hash,
    head_hash,
    partial_directory,
    read_manifest,
    row_tensors,
    rows_hash,
    shard_name,
    size,
    tokenizer_hash,
)
from hylo.distill.finite import bad_weight, is_finite
from hylo.distill.settings import Precision, Training
from hylo.distill.student import check_pair, read_head, stored_dtype
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.files import write_json, write_text
from hylo.modeling.loading import load_model, read_configuration
from hylo.ops.divergence import teacher_vectors

SHARD_BYTES = 1 << 28  # what a killed run loses at most
BATCH_TOKENS = 16384  # that the teacher reads at once; at least a row
JOURNAL = "shards.jsonl"
QUIET_REPORTS = 10  # lines where there is no terminal to draw a bar on


class CacheSettings(BaseModel):
    """What fixes the rows of an extension stage, with the meaning that it has there, and how they are stored.

    Raises pydantic.ValidationError on unknown keys and on values out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: list[str] = Field([], description="the sources of the text, by name")
    facts: float = Field(0.0, ge=0, le=1, description="share of rows with synthetic retrieval")
    length: int = Field(gt=0, description="tokens of a sequence")
    rows: int = Field(gt=0, description="sequences of a step")
    tokens: int = Field(gt=0, description="in all, rounded down to whole steps (at least one)")
    seed: int = Field(0, ge=0)
    precision: Precision = "float32"
    dtype: VectorType = "float32"

    @property
    def count(self) -> int:
        """Rows in all, as hylo.distill.Training counts them."""
        return max(1, self.tokens // (self.rows * self.length)) * self.rows

    @classmethod
    def of(cls, training: Training) -> "CacheSettings":
        """Those of a recipe's stage."""
        return cls(**training.model_dump(include={"length", "rows", "tokens", "seed", "precision"}))


def write_teacher_cache(
    teacher: Path,
    student: Path,
    out: Path,
    rows: Rows,
    settings: CacheSettings,
    console: Console | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes what `teacher` says about the rows to the new directory `out`, for students with the head of `student`.

    `rows(length, count)` gives the rows, of `settings.data`. Goes on with what an earlier call has left. Raises
    HyloError if the two models do not belong together, if `out` exists or a partial one is of something else, if the
    text has changed since, if what the teacher gives is not finite, or if the disk is full (what is there stays).
    """
    console = console or Console()
    if out.exists():
        raise HyloError(f"{out} exists already; choose another output directory or remove it")
    read_configuration(teacher)
    head = read_head(student)
    check_pair(student, teacher, settings.length)
    dataset = rows(settings.length, settings.count)
    recipe = make_recipe(teacher, student, head, settings, "position_ids" in dataset[0], shard_bytes)
    partial = partial_directory(out)
    try:
        done = _begin(
            partial,
            Manifest(complete=False, recipe=recipe, teacher=str(teacher), student=str(student), versions=_versions()),
        )
        _check_text(partial, recipe, done, dataset)
        _announce(out, recipe, len(done), console)
        if len(done) < recipe.shards:
            _write_shards(partial, recipe, done, dataset, TeacherOfRows(teacher, head, settings.precision), console)
        _finish(partial, out, [done[i] for i in range(recipe.shards)])
    except OSError as error:
        raise HyloError(
            f"cannot write {partial}: {error.strerror or error}; free space or choose a writable place, and call the "
            "same command again, which goes on with what is there"
        ) from error


def make_recipe(
    teacher: Path,
    student: Path,
    head_VD: Tensor,
    settings: CacheSettings,
    packed: bool,
    shard_bytes: int = SHARD_BYTES,
) -> CacheRecipe:
    vocabulary = min(len(head_VD), AutoConfig.from_pretrained(teacher, local_files_only=True).vocab_size)
    token_bytes = head_VD.shape[1] * getattr(torch, settings.dtype).itemsize + (12 if packed else 8)
    return CacheRecipe(
        head=head_hash(head_VD, vocabulary),
        tokenizer=tokenizer_hash(student),
        teacher=model_hash(teacher),
        vocabulary=vocabulary,
        width=head_VD.shape[1],
        vectors=settings.dtype,
        precision=settings.precision,
        packed=packed,
        data=settings.data,
        facts=settings.facts,
        seed=settings.seed,
        length=settings.length,
        rows=settings.rows,
        count=settings.count,
        shard_rows=max(1, shard_bytes // (settings.length * token_bytes)),
    )


class TeacherOfRows:
    """A frozen teacher, run as a live one is, on the GPU where there is one."""

    def __init__(self, directory: Path, student_head_VD: Tensor, precision: Precision) -> None:
        self.directory, self.precision = directory, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = stored_dtype(directory) if precision == "bf16" else torch.float32
        self.model: PreTrainedModel = load_model(directory, dtype, self.device).requires_grad_(False)
        self.head = student_head_VD.to(self.device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors (R, T, D) and negative entropies (R, T), in float32, of a batch as in hylo.distill.batch."""
        inputs = model_inputs({name: values.long().to(self.device) for name, values in batch.items()})
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            vectors, neg_entropy = teacher_vectors(hidden.flatten(0, 1), self.model.lm_head.weight, self.head)
        if not (is_finite(vectors) and is_finite(neg_entropy)):
            weight = bad_weight(self.model)
            cause = f"its {weight}" if weight else "its hidden states overflow"
            raise HyloError(f"what teacher {self.directory} gives is not finite: {cause}; restore it, or use float32")
        shape = inputs["input_ids"].shape
        return vectors.unflatten(0, shape), neg_entropy.unflatten(0, shape)


def _begin(partial: Path, manifest: Manifest) -> dict[int, Shard]:
    """Claims the partial directory, and returns the whole shards that are there already."""
    if not (partial / MANIFEST).exists():
        if partial.exists() and any(partial.iterdir()):
            raise HyloError(f"{partial} exists and holds no part of a cache; remove it, or choose another OUT")
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / MANIFEST, manifest.model_dump())
        return {}
    there = read_manifest(partial)
    if there.recipe != manifest.recipe:
        theirs, ours = there.recipe.model_dump(), manifest.recipe.model_dump()
        differing = ", ".join(
            f"another {key}" if key in ("head", "tokenizer", "teacher") else f"{key} {theirs[key]}, not {ours[key]}"
            for key in ours
            if theirs[key] != ours[key]
        )
        raise HyloError(
            f"{partial} is part of another cache ({differing}); finish that one with its own command, remove it, or "
            "choose another OUT"
        )
    noted = there.shards if there.complete else _read_journal(partial / JOURNAL)
    by_name = {shard.file: shard for shard in noted}
    named = ((i, by_name.get(shard_name(i))) for i in range(manifest.recipe.shards))
    return {i: shard for i, shard in named if shard is not None and _is_whole(partial / shard.file, shard)}


def _read_journal(path: Path) -> list[Shard]:
    shards = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValidationError):  # a last line that was cut off
            shards.append(Shard.model_validate_json(line))
    return shards


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and file_hash(path) == shard.sha256


def _check_text(
    partial: Path, recipe: CacheRecipe, done: dict[int, Shard], dataset: Dataset[dict[str, Tensor]]
) -> None:
    for i, shard in done.items():
        if rows_hash(row_tensors(dataset, recipe.rows_of(i))) != shard.rows_sha256:
            raise HyloError(
                f"the text gives other rows than {partial} was begun with; give the text as it was, remove the "
                "directory, or choose another OUT"
            )


def _announce(out: Path, recipe: CacheRecipe, done: int, console: Console) -> None:
    needed = recipe.tokens * recipe.token_bytes
    free = shutil.disk_usage(out.parent).free
    lines = [
        f"teacher cache {out}: {recipe.tokens:,} tokens of {recipe.token_bytes:,} bytes each, {size(needed)} in all, "
        f"{size(free)} free, shards: {recipe.shards}"
    ]
    if done:
        lines.append(f"{done} of {recipe.shards} shards are there already")
    if needed * (recipe.shards - done) // recipe.shards > free:
        lines.append("this will not fit; where it stops for want of space, the same command goes on later")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _write_shards(
    partial: Path,
    recipe: CacheRecipe,
    done: dict[int, Shard],
    dataset: Dataset[dict[str, Tensor]],
    teacher: TeacherOfRows,
    console: Console,
) -> None:
    """Adds to `done` every shard that is missing there."""
    write_text(partial / JOURNAL, "".join(_line(shard) for shard in done.values()))
    with (
        (partial / JOURNAL).open("a", encoding="utf-8") as journal,
        Progress(console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task("teacher cache", total=recipe.shards, completed=len(done))
        for i in range(recipe.shards):
            if i in done:
                continue
            rows = row_tensors(dataset, recipe.rows_of(i))
            at_once = max(1, BATCH_TOKENS // recipe.length)
            batches = [
                teacher(dict(zip(rows, parts, strict=True)))
                for parts in zip(*(values.split(at_once) for values in rows.values()), strict=True)
            ]
            vectors, neg_entropy = (torch.cat([part.cpu() for part in parts]) for parts in zip(*batches, strict=True))
            said = {"vectors": vectors.to(getattr(torch, recipe.vectors)), "neg_entropy": neg_entropy.float()}
            data = save(rows | said, {"format": "pt"})
            _write_aside(partial / shard_name(i), data)
            done[i] = Shard(
                file=shard_name(i),
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                rows_sha256=rows_hash(rows),
            )
            journal.write(_line(done[i]))
            journal.flush()
            os.fsync(journal.fileno())
            bar.update(task, completed=len(done))
            n = len(done)
            if (
                not console.is_terminal
                and n * QUIET_REPORTS // recipe.shards > (n - 1) * QUIET_REPORTS // recipe.shards
            ):
                console.print(f"teacher cache: {n} of {recipe.shards} shards written", highlight=False)


def _write_aside(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.aside")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()  # its space may be what the user needs to tidy up
        raise


def _finish(partial: Path, out: Path, shards: list[Shard]) -> None:
    order = hashlib.sha256("".join(shard.rows_sha256 for shard in shards).encode()).hexdigest()
    manifest = read_manifest(partial).model_copy(update={"complete": True, "order": order, "shards": shards})
    write_json(partial / MANIFEST, manifest.model_dump())
    for leftover in (partial / JOURNAL, *partial.glob(".*.aside")):
        leftover.unlink(missing_ok=True)
    os.rename(partial, out)


def _line(shard: Shard) -> str:
    return json.dumps(shard.model_dump()) + "\n"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("hylo", "torch", "transformers")}
