"""The exact teacher cache: a teacher's part of the forward KL, one vector and one number a token, on disk.

With the student's head W_S frozen and p = softmax(W_T h_T), the teacher's part of the divergence is c = W_S^T p and
sum p log p (hylo.ops.divergence.teacher_vectors), exact over the whole vocabulary. A cache is a directory:

    manifest.json            what it was made with and of, and every shard's checksum; see `Manifest`
    rows-00000.safetensors   input_ids (R, T) int32, vectors (R, T, D), neg_entropy (R, T) float32,
                             position_ids (R, T) int32 where rows pack several documents
    rows-00001.safetensors   ...

The token ids lie beside the vectors that belong to them, so that training needs neither text nor tokenizer, and cannot
read other rows than those that the teacher read.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from hylo.distill.settings import Precision
from hylo.distill.student import read_head
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.files import read_json

FORMAT, VERSION, MANIFEST = "hylo-teacher-cache", 2, "manifest.json"
PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle", "*.ckpt")
HASH_THREADS = 4
VectorType = Literal["float32", "bfloat16"]
DTYPES = {"F32": "float32", "BF16": "bfloat16"}  # as safetensors names them


class CacheRecipe(BaseModel):
    """All that decides what a cache holds. Hashes are sha256 in hex; `length` and `rows` as in hylo.distill.Training.

    Raises pydantic.ValidationError on unknown keys and on values out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    head: str = Field(description="hash of the student's lm_head as float32, cut to `vocabulary` rows")
    tokenizer: str | None = Field(description="hash of the student's vocabulary; None if it has no tokenizer.json")
    teacher: str = Field(description="hash of the teacher's config.json and of its weight files' sizes and ends")
    vocabulary: int = Field(gt=0, description="tokens that both models have")
    width: int = Field(gt=0, description="values of a vector: the student's hidden width")
    vectors: VectorType
    neg_entropy: Literal["float32"] = "float32"
    temperature: Annotated[float, Field(ge=1, le=1)] = 1.0
    precision: Precision = Field(description="that the teacher ran in")
    packed: bool = Field(description="whether rows have position_ids, which tell their documents apart")
    data: list[str]
    facts: float
    seed: int
    length: int = Field(gt=0)
    rows: int = Field(gt=0)
    count: int = Field(gt=0, description="rows in all")
    shard_rows: int = Field(gt=0, description="rows of a shard; the last may have fewer")

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @property
    def token_bytes(self) -> int:
        """On disk: the vector, the entropy, the token's id, its place in its document."""
        return self.width * getattr(torch, self.vectors).itemsize + (12 if self.packed else 8)

    @property
    def row_tensors(self) -> tuple[str, ...]:
        """What a shard holds of the rows themselves."""
        return ("input_ids", "position_ids") if self.packed else ("input_ids",)

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_rows, min(self.count, (shard + 1) * self.shard_rows))


class Shard(BaseModel):
    """One file: its checksum, and the hash of its rows' tensors (int32, little-endian)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    bytes: int
    sha256: str
    rows_sha256: str


class Manifest(BaseModel):
    """manifest.json. `teacher` and `student` are the paths as they were given, to be read by people alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["hylo-teacher-cache"] = "hylo-teacher-cache"
    version: Literal[2] = 2
    complete: bool
    recipe: CacheRecipe
    teacher: str
    student: str
    versions: dict[str, str]
    order: str | None = None  # hash of the data order: of all shards' rows_sha256
    shards: list[Shard] = []


class TeacherCache:
    """A complete cache to train from. The checks raise HyloError, each with what differs and how to mend it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.recipe = self.manifest.recipe
        if not self.manifest.complete:
            raise _incomplete(directory)
        listed = [shard.file for shard in self.manifest.shards]
        if len(listed) != self.recipe.shards or listed != [shard_name(i) for i in range(len(listed))]:
            raise HyloError(
                f"manifest {directory / MANIFEST} does not list its {self.recipe.shards} shards in order; "
                "restore the file, or make the cache again"
            )
        for shard in self.manifest.shards:
            _check_size(directory / shard.file, shard.bytes)

    def check_order(self, **given: Any) -> None:
        """Holds `length`, `rows`, `seed` and `facts`, where given, against the cache's; `tokens` may be fewer.

        They count in whole steps, as a stage takes them.
        """
        tokens = given.pop("tokens", None)
        for key, value in given.items():
            if value is not None and value != (ours := getattr(self.recipe, key)):
                raise HyloError(
                    f"teacher cache {self.directory} was made with {key} {ours}, not {value}; leave {key} out, or make "
                    "a cache with it"
                )
        step = self.recipe.rows * self.recipe.length
        if tokens is not None and tokens // step * step > self.recipe.tokens:
            raise HyloError(
                f"teacher cache {self.directory} holds {self.recipe.tokens} tokens, fewer than {tokens}; train on "
                "fewer tokens, or make a larger cache"
            )

    def check_student(self, student: Path) -> Tensor:
        """The student's head (V, D), if head and tokenizer are those that the cache was made with."""
        head = read_head(student)
        if head_hash(head, self.recipe.vocabulary) != self.recipe.head:
            raise HyloError(
                f"the lm_head of {student} is not the one that teacher cache {self.directory} was made with (that of "
                f"{self.manifest.student}); train a student with that head, or make a cache with --student {student}"
            )
        if tokenizer_hash(student) != self.recipe.tokenizer:
            raise HyloError(
                f"the tokenizer of {student} is not the one that teacher cache {self.directory} was made with (that of "
                f"{self.manifest.student}); train from a student with that tokenizer, or make a cache with this one"
            )
        return head

    def verify(self, rows: Rows | None = None, console: Console | None = None) -> None:
        """Reads every shard once and holds it against its checksum; with `rows`, their tokens against the cache's."""
        total = sum(shard.bytes for shard in self.manifest.shards)
        if console is not None:
            console.print(f"checking {size(total)} of teacher cache {self.directory}", highlight=False, soft_wrap=True)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            paths = [self.directory / shard.file for shard in self.manifest.shards]
            for path, shard, found in zip(paths, self.manifest.shards, pool.map(file_hash, paths), strict=True):
                if found != shard.sha256:
                    pool.shutdown(cancel_futures=True)
                    raise HyloError(f"shard {path} is damaged: its checksum is another; copy or make the cache again")
        for i in range(self.recipe.shards):
            self._check_header(i)
        if rows is not None:
            self._check_rows(rows)

    def _check_header(self, shard: int) -> None:
        recipe, path = self.recipe, self.directory / shard_name(shard)
        shape = (len(recipe.rows_of(shard)), recipe.length)
        expected = {
            **{name: ("I32", [*shape]) for name in recipe.row_tensors},
            "vectors": ({"float32": "F32", "bfloat16": "BF16"}[recipe.vectors], [*shape, recipe.width]),
            "neg_entropy": ("F32", [*shape]),
        }
        with open_shard(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        if found != expected:
            raise HyloError(f"shard {path} holds {found}, not {expected}; make the cache again")

    def _check_rows(self, rows: Rows) -> None:
        dataset = rows(self.recipe.length, self.recipe.count)
        for i, shard in enumerate(self.manifest.shards):
            if rows_hash(row_tensors(dataset, self.recipe.rows_of(i))) != shard.rows_sha256:
                first = self.recipe.rows_of(i)[0]
                raise HyloError(
                    f"the text gives other rows than teacher cache {self.directory} was made of (from row {first} on); "
                    "leave the text out and train on the cache's own rows, or make a cache of this text"
                )

    def dataset(self, length: int, count: int) -> "CachedRows":
        """The first `count` rows; `length` is the cache's."""
        return CachedRows(self, count)


class CachedRows(Dataset[dict[str, Tensor]]):
    """{"input_ids": (T,) int64, "vectors": (T, D), "neg_entropy": (T,)} of row i, read from its memory-mapped shard.

    And "position_ids": (T,) int64 where the rows have them.
    """

    def __init__(self, cache: TeacherCache, count: int) -> None:
        self.cache, self.count = cache, count
        self._open: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shard, row = divmod(index, self.cache.recipe.shard_rows)
        if self._open[0] != shard:  # rows come in order, so one open shard is enough
            self._open = (shard, open_shard(self.cache.directory / shard_name(shard)))
        names = self.cache.recipe.row_tensors
        tensors = {name: self._open[1].get_slice(name)[row] for name in (*names, "vectors", "neg_entropy")}
        return tensors | {name: tensors[name].long() for name in names}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a cache, complete or not; HyloError if there is none, or one of another version."""
    if not directory.is_dir():
        if not directory.exists() and partial_directory(directory).is_dir():
            raise _incomplete(directory)
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise HyloError(f"teacher cache {directory} {problem}; check the path")
    path = directory / MANIFEST
    if not path.exists():
        if pickles := sorted(file.name for pattern in PICKLES for file in directory.glob(pattern)):
            raise HyloError(
                f"{directory} holds pickled files ({pickles[0]}) and no teacher cache; only safetensors are read: make "
                "one with hylo teacher-cache"
            )
        raise HyloError(f"{directory} holds no {MANIFEST}, so it is no teacher cache; make one with hylo teacher-cache")
    values = read_json(path, "manifest")
    if values.get("format") != FORMAT:
        raise HyloError(f"manifest {path} is of format {values.get('format')}, not {FORMAT}; check the path")
    if values.get("version") != VERSION:
        raise HyloError(
            f"teacher cache {directory} is of format version {values.get('version')}, and this hylo reads version "
            f"{VERSION}; make the cache again"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HyloError(f"manifest {path} is damaged ({where}: {first['msg']}); restore the file") from None
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or not shard.file.endswith(".safetensors"):
            raise HyloError(f"manifest {path} names {shard.file}; only safetensors files beside it are read")
    return manifest


def partial_directory(out: Path) -> Path:
    """Where a cache grows until it is complete."""
    return out.with_name(f"{out.name}.partial")


def shard_name(index: int) -> str:
    return f"rows-{index:05d}.safetensors"


def open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise HyloError(f"shard {path} is no whole safetensors file ({reason}); make the cache again") from error


def row_tensors(dataset: Dataset[dict[str, Tensor]], indices: Iterable[int]) -> dict[str, Tensor]:
    """input_ids and, where the rows have them, position_ids: each (rows, T) int32."""
    rows = [dataset[i] for i in indices]
    names = [name for name in ("input_ids", "position_ids") if name in rows[0]]
    return {name: torch.stack([row[name] for row in rows]).to(torch.int32) for name in names}


def rows_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, values_RT in tensors.items():
        digest.update(name.encode() + values_RT.numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def head_hash(head_VD: Tensor, vocabulary: int) -> str:
    """Of the rows that both vocabularies have, as float32, little-endian."""
    values = head_VD[:vocabulary].float().contiguous().numpy()
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").data).hexdigest()


def tokenizer_hash(directory: Path) -> str | None:
    """Of the words and their ids; None where there is no tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    words = sorted((index, word) for word, index in Tokenizer.from_file(str(path)).get_vocab().items())
    return hashlib.sha256(repr(words).encode()).hexdigest()


def file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HyloError(f"shard {path} cannot be read ({error.strerror}); copy or make the cache again") from error


def size(count: float) -> str:
    """A number of bytes, to be read."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise HyloError(f"shard {path} is missing; copy it there, or make the cache again")
    if (found := path.stat().st_size) != expected:
        raise HyloError(f"shard {path} has {found} bytes, not {expected}; copy or make the cache again")


def _incomplete(directory: Path) -> HyloError:
    return HyloError(
        f"teacher cache {directory} is incomplete; call the same hylo teacher-cache command again, which goes on"
    )
