"""lm-eval's tasks and where their data come from: a local copy where there is one, or else the hub.

A local copy of a set is a folder with the hub's columns: DIR/HUB-NAME (as DIR/allenai/ai2_arc), DIR/TASK, or the hub
cache's own DIR/datasets--allenai--ai2_arc. In it, or in a folder of the configuration's name (ARC-Easy) in it: what
`save_to_disk` wrote, or parquet or JSON-lines files named by their split (test.jsonl, test-00000-of-00001.parquet,
test/anything.parquet). A snapshot of the hub is such a folder.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_from_disk

from hylo.errors import HyloError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FOLDERS = ("arc", "hellaswag", "openbookqa", "piqa", "race", "winogrande", "gsm8k", "ruler")  # of lm-eval's tasks
SEED = 1234  # of the examples of few-shot prompts, lm-eval's own
KINDS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Source:
    """A task's set on the hub: its name, configuration, the split that is evaluated, the columns that are read."""

    hub: str
    configuration: str | None
    split: str
    columns: tuple[str, ...]
    shots: str = "train"  # the split that examples are drawn from


ARC = ("question", "choices", "answerKey")
SOURCES = {
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", "test", ARC),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", "test", ARC),
    "hellaswag": Source(
        "Rowan/hellaswag", None, "validation", ("ctx_a", "ctx_b", "activity_label", "endings", "label")
    ),
    "openbookqa": Source("allenai/openbookqa", "main", "test", ("question_stem", "choices", "answerKey")),
    "piqa": Source("baber/piqa", None, "validation", ("goal", "sol1", "sol2", "label")),
    "race": Source("EleutherAI/race", "high", "test", ("article", "problems"), shots="test"),
    "winogrande": Source(
        "allenai/winogrande", "winogrande_xl", "validation", ("sentence", "option1", "option2", "answer")
    ),
    "gsm8k": Source("openai/gsm8k", "main", "test", ("question", "answer")),
}


def local_copy(task: str, data: Path | None, few_shot: int) -> DatasetDict | None:
    """The splits of a task's set that are needed, read from `data`; None where no copy lies there.

    Raises HyloError for a folder that does not exist, and for a copy that lacks a split or a column or is damaged.
    """
    if data is None:
        return None
    if not data.is_dir():
        raise HyloError(f"local copies {data} do not exist; check the path")
    source = SOURCES[task]
    folder = next((place for place in places(task, data) if place.is_dir()), None)
    if folder is None:
        return None
    splits = dict.fromkeys([source.split, source.shots] if few_shot else [source.split])
    return DatasetDict({split: _checked(_read(folder, source, split, task), folder, source, split) for split in splits})


def places(task: str, data: Path) -> list[Path]:
    """Where in `data` a copy of a task's set may lie, the first that exists being used."""
    hub = SOURCES[task].hub
    cached = data / f"datasets--{hub.replace('/', '--')}"
    names = sorted((cached / "snapshots").glob("*")) if cached.is_dir() else []
    if (main := cached / "refs" / "main").is_file():
        names = [cached / "snapshots" / main.read_text().strip()]
    return [data / hub, data / task, *names]


@lru_cache(maxsize=32)
def _read(folder: Path, source: Source, split: str, task: str) -> Dataset:
    configured = folder / source.configuration if source.configuration else folder
    folders = [place for place in (configured, folder / "data", folder) if place.is_dir()]
    try:
        for place in folders:
            if (place / "dataset_dict.json").is_file():
                return load_from_disk(place, keep_in_memory=True)[split]
            if files := _files(place, split):
                return _table(files)
    except KeyError:
        pass  # a saved set without the split
    except (OSError, ValueError, UnicodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise HyloError(f"local copy {folder} of {task} is not readable ({reason}); restore it") from error
    raise HyloError(
        f"local copy {configured if configured in folders else folder} of {task} has no split {split}; add it"
    )


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, in order; of one kind, as a copy may hold the same rows twice."""
    for kind in KINDS:
        for pattern in (f"{split}{kind}", f"{split}-*{kind}", f"{split}/*{kind}"):
            if found := sorted(folder.glob(pattern)):
                return found
    return []


def _table(files: list[Path]) -> Dataset:
    if files[0].suffix == ".parquet":
        return Dataset(pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in files]))
    return Dataset.from_list([json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()])


def _checked(rows: Dataset, folder: Path, source: Source, split: str) -> Dataset:
    if missing := [column for column in source.columns if column not in rows.column_names]:
        raise HyloError(f"local copy {folder} lacks column {', '.join(missing)} in split {split}; copy it whole")
    if not len(rows):
        raise HyloError(f"local copy {folder} has no row in split {split}; copy it whole")
    return rows


def load_task(task: str, data: Path | None, few_shot: int) -> "Task":
    """A task of lm-eval with its data. Raises HyloError for a copy as `local_copy` does, others where none is had."""
    source, copy = SOURCES[task], local_copy(task, data, few_shot)
    changes: dict[str, Any] = {}
    if not few_shot:  # no other split is read than the one that is evaluated
        unused = {"training_split", "validation_split", "fewshot_split"}
        changes |= dict.fromkeys(unused - {"validation_split"} if source.split == "validation" else unused)
    if copy is not None:
        changes["custom_dataset"] = _giving(copy)
    loaded = _load(task, changes)
    loaded.set_config(key="num_fewshot", value=few_shot)
    loaded.set_fewshot_seed(seed=SEED)
    return loaded


def load_ruler_task(task: str, lengths: tuple[int, ...], tokenizer: Path) -> "Task":
    """A task of lm-eval's `ruler` group; makes its 500 samples a length, from lm-eval's own seed."""
    random.seed(0)  # lm-eval's seeds, before each task, so that its samples do not depend on which others are made
    numpy.random.seed(SEED)
    return _load(task, {"metadata": {"max_seq_lengths": list(lengths), "tokenizer": str(tokenizer)}})


def _giving(copy: DatasetDict) -> Callable[..., DatasetDict]:
    return lambda **_: copy


def _load(task: str, changes: dict[str, Any]) -> "Task":
    """A registered task with some of its configuration changed, which lm-eval allows in a group."""
    group = {"group": "hylo", "task": [{"task": task, **changes}]}
    return _manager().load([group])["tasks"][task]


@lru_cache(maxsize=1)
def _manager() -> "TaskManager":
    """Of the folders that hold these tasks: reading all of lm-eval's takes seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[root / name for name in FOLDERS], include_defaults=False)
