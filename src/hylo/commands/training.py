"""hylo align, extend and teacher-cache: the stages that train, each alone; the same command again goes on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from pydantic import BaseModel, ValidationError

from hylo.commands import shared
from hylo.commands.shared import (
    AsPublishedOption,
    BaseArgument,
    OutArgument,
    Precision,
    TrackOption,
    absent,
    launch,
)
from hylo.errors import HyloError

if TYPE_CHECKING:
    from hylo.data.settings import Data

DATA = "text file, folder, python-stdlib, or .jsonl or .parquet with a column text; repeatable"
DataOption = Annotated[list[str], typer.Option("--data", help=DATA)]
FactsOption = Annotated[float, typer.Option(help="share of rows with synthetic retrieval", min=0, max=1)]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, any key of a recipe's stage, e.g. micro_rows=4; repeatable"),
]
EpochsOption = Annotated[int, typer.Option(help="times that the text may be read", min=1)]

NAMES = {"layers": "align", "distill": "extend", "on_policy": "on-policy", "dpo": "dpo"}  # whose rows are drawn

# What fixes an extension's rows, for hylo extend and hylo teacher-cache alike.
EXTENSION: dict[str, Any] = {"length": 8192, "tokens": 8_000_000_000, "rows": 32, "facts": 0.0, "seed": 0}
EXTENSION |= {"precision": "bf16"}
PUBLISHED_CONTEXT = {"llama": 2048, "qwen3": 32768}  # where YaRN begins in the released models


def align(
    base: BaseArgument,
    student: Annotated[Path, typer.Argument(help="directory written by convert")],
    out: OutArgument,
    data: DataOption,
    facts: FactsOption = 0.0,
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = 2048,
    tokens: Annotated[int, typer.Option(help="tokens to train on")] = 2_000_000_000,
    rows: Annotated[int, typer.Option(help="sequences of a step")] = 96,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 2e-4,
    precision: Annotated[Precision, typer.Option()] = "bf16",
    seed: Annotated[int, typer.Option()] = 0,
    layers_at_once: Annotated[int | None, typer.Option(help="layers in memory at a time; all if left out")] = None,
    settings: SettingsOption = None,
    as_published: AsPublishedOption = False,
    epochs: EpochsOption = 1,
    track: TrackOption = None,
) -> None:
    """Stage 1: every layer learns to do what the base's layer does, fed the base's hidden states."""
    given: dict[str, Any] = {"length": length, "tokens": tokens, "rows": rows, "learning_rate": learning_rate}
    given |= {"seed": seed, "precision": precision, "objective": "layers", "layers_at_once": layers_at_once}
    _train(given, settings, student, out, base, base, Text(data, facts, not as_published, epochs), track)


def extend(
    student: Annotated[Path, typer.Argument(help="directory written by convert, align or extend")],
    out: OutArgument,
    teacher: Annotated[
        Path | None, typer.Option(help="directory of the teacher: the base, or a larger model of its family")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help=DATA)] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="directory written by teacher-cache, in place of --teacher and --data")
    ] = None,
    facts: Annotated[
        float | None,
        typer.Option(help="share of rows with synthetic retrieval; default 0, or the cache's", min=0, max=1),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="tokens of a sequence, the result's supported length; default 8192, or the cache's"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens to train on; default 8000000000, or all of the cache's")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="sequences of a step; default 32, or the cache's")] = None,
    learning_rate: Annotated[float, typer.Option(help="peak")] = 6e-5,
    yarn_original: Annotated[
        int | None,
        typer.Option(
            help="context above which YaRN stretches; the base's if left out, the paper's with --as-published",
            min=1,
        ),
    ] = None,
    precision: Annotated[Precision | None, typer.Option(help="default bf16, or the cache's")] = None,
    seed: Annotated[int | None, typer.Option(help="of the rows; default 0, or the cache's")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="forward_kl, reverse_kl, jsd, cross_entropy, {forward_kl: 0.9, ...}, on_policy or dpo"),
    ] = None,
    frozen_head: Annotated[
        bool, typer.Option("--frozen-head", help="train all but the head, as from a cache; a tied one is untied")
    ] = False,
    settings: SettingsOption = None,
    as_published: AsPublishedOption = False,
    epochs: EpochsOption = 1,
    track: TrackOption = None,
) -> None:
    """Stage 2: distils the whole hybrid from a teacher at a longer context; beyond the base's, with YaRN on MLA."""
    from hylo.distill.tracking import tracked

    yarn_original = yarn_original or yarn_from(student, as_published)
    given = {"length": length, "tokens": tokens, "rows": rows, "facts": facts, "seed": seed, "precision": precision}
    common: dict[str, Any] = {"learning_rate": learning_rate} | ({"trains": "all_but_head"} if frozen_head else {})
    if objective is not None:
        common["objective"] = from_yaml("--objective", objective)
    if teacher_cache is not None:
        if teacher is not None:
            raise HyloError("give either --teacher with --data, or --teacher-cache, not both; leave one of them out")
        if objective is not None:
            raise HyloError("a teacher cache is made for forward_kl; leave --objective out")
        text = Text(data, facts or 0.0, not as_published, epochs) if data else None
        with tracked(track):
            _extend_from_cache(student, out, teacher_cache, text, given, common, settings, yarn_original)
        return
    values = EXTENSION | {key: value for key, value in given.items() if value is not None}
    share = values.pop("facts")
    if not data:
        raise HyloError("extend needs either --teacher and --data, or --teacher-cache; give one of the two")
    text = Text(data, share, not as_published, epochs)
    _train(values | common, settings, student, out, None, teacher, text, track, yarn_original)


def yarn_from(student: Path, as_published: bool) -> int | None:
    """Where YaRN begins unless it is told: at the end of the base's context (None), or where the paper has it."""
    from hylo.modeling.loading import read_hylo_config

    return PUBLISHED_CONTEXT.get(read_hylo_config(student).base_model_type) if as_published else None


def _train(
    given: dict[str, Any],
    settings: list[str] | None,
    student: Path,
    out: Path,
    base: Path | None,
    teacher: Path | None,
    text: "Text",
    track: str | None,
    yarn_original: int | None = None,
) -> None:
    from hylo.checkpoint import read_tokenizer
    from hylo.data.training import TrainingData
    from hylo.distill.settings import Training
    from hylo.distill.tracking import tracked
    from hylo.stages import Materials, run_stage

    launch()
    absent(out)
    training = validated(Training, **given | settings_of(settings))
    if (training.kind == "layers") != (base is not None):
        command = "align" if training.kind == "layers" else "extend"
        raise HyloError(f"objective {training.objective_text} is not for this command; use hylo {command}")
    if training.teacher_source == "cache":
        raise HyloError("a stage from a cache: give --teacher-cache in place of --set teacher=cache")
    if training.teacher_source == "live" and teacher is None:
        wanted = "give either --teacher and --data, or --teacher-cache"
        raise HyloError(f"objective {training.objective_text} needs a teacher; {wanted}")
    data = text.data(preferences=training.kind == "dpo")
    source = TrainingData(data, read_tokenizer(student), console=shared.console)
    materials = Materials(base, teacher, source, yarn_original, shared.console)
    with tracked(track):
        run_stage(training, student, out, materials, NAMES[training.kind])
    shared.console.print(f"wrote {out}")


def _extend_from_cache(
    student: Path,
    out: Path,
    cache: Path,
    text: "Text | None",
    given: dict[str, Any],
    common: dict[str, Any],
    settings: list[str] | None,
    yarn_original: int | None,
) -> None:
    """What is not given is the cache's; what is given must be the cache's."""
    from hylo.checkpoint import read_tokenizer
    from hylo.data.training import TrainingData
    from hylo.distill.cache import TeacherCache
    from hylo.distill.extend import extend_from_cache as run
    from hylo.distill.settings import Training

    launch()
    absent(out)
    held = TeacherCache(cache)
    held.check_order(**{key: value for key, value in given.items() if key != "precision"})
    own = held.recipe.model_dump() | {"tokens": held.recipe.tokens}
    given = {key: own[key] if value is None else value for key, value in given.items()}
    facts = given.pop("facts")
    given |= common | {"teacher": "cache", "trains": "all_but_head"}
    training = validated(Training, **given | settings_of(settings))
    rows = None
    if text is not None:
        data = replace(text, facts=facts).data()
        source = TrainingData(data, read_tokenizer(student), console=shared.console)
        rows = source.rows(NAMES["distill"], training.seed)
    run(student, cache, out, training, yarn_original, rows, shared.console)
    shared.console.print(f"wrote {out}")


def teacher_cache(
    teacher: Annotated[
        Path, typer.Argument(help="directory of the teacher: the base, or a larger model of its family")
    ],
    data: Annotated[list[str], typer.Argument(help="text files, folders, or python-stdlib: one or several")],
    out: OutArgument,
    student: Annotated[Path, typer.Option(help="directory whose lm_head the students that train from it will have")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the vectors")] = "float32",
    facts: FactsOption = EXTENSION["facts"],
    length: Annotated[int, typer.Option(help="tokens of a sequence")] = EXTENSION["length"],
    tokens: Annotated[int, typer.Option(help="tokens in all")] = EXTENSION["tokens"],
    rows: Annotated[int, typer.Option(help="sequences of a step")] = EXTENSION["rows"],
    precision: Annotated[Precision, typer.Option(help="that the teacher runs in")] = EXTENSION["precision"],
    seed: Annotated[int, typer.Option(help="of the rows")] = EXTENSION["seed"],
    shard_gib: Annotated[float, typer.Option(help="size of a file", min=0.000001)] = 0.25,
    as_published: AsPublishedOption = False,
    epochs: EpochsOption = 1,
) -> None:
    """Runs a teacher over an extension's rows and keeps what it says, one vector a token; a second call goes on."""
    from hylo.checkpoint import read_tokenizer
    from hylo.data.training import TrainingData
    from hylo.distill.cache_writer import CacheSettings, write_teacher_cache

    absent(out)
    settings = validated(
        CacheSettings,
        data=data,
        facts=facts,
        length=length,
        rows=rows,
        tokens=tokens,
        seed=seed,
        precision=precision,
        dtype=dtype,
    )
    text = Text(data, facts, not as_published, epochs).data()
    source = TrainingData(text, read_tokenizer(student), console=shared.console)
    shard_bytes = int(shard_gib * 2**30)
    write_teacher_cache(teacher, student, out, source.rows("extend", seed), settings, shared.console, shard_bytes)
    shared.console.print(f"wrote {out}")


@dataclass(frozen=True)
class Text:
    """What --data and its neighbours say."""

    paths: list[str]
    facts: float = 0.0
    boundaries: bool = True
    epochs: int = 1

    def data(self, preferences: bool = False) -> "Data":
        """As a recipe would say it: records by their suffix, text otherwise."""
        from hylo.data.settings import Data

        columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} if preferences else {}
        sources: list[dict[str, Any]] = []
        for path in self.paths:
            kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(path).suffix)
            sources.append({"kind": kind or "text", "paths": [path]} | (columns if kind else {}))
        if self.facts:
            sources.append({"kind": "retrieval", "share": self.facts})
        return Data.model_validate({"sources": sources, "boundaries": self.boundaries, "epochs": self.epochs})


def settings_of(settings: list[str] | None) -> dict[str, Any]:
    values = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise HyloError(f"--set {setting}: write KEY=VALUE, e.g. micro_rows=4")
        values[key] = from_yaml(f"--set {setting}", text)
    return values


def from_yaml(option: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HyloError(f"{option}: {text!r} is not understood ({' '.join(str(error).split())})") from None


def validated(model: type[BaseModel], **values: Any) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise HyloError(f"{message}") from None
        option = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise HyloError(f"--set {option}: unknown key; check its spelling") from None
        raise HyloError(f"--{option.replace('_', '-')} {first['input']}: {message}") from None
