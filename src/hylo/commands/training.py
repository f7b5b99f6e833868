"""hylo align, extend and teacher-cache: the stages that train, each alone."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ValidationError

from hylo.commands import shared
from hylo.commands.shared import BaseArgument, OutArgument, Precision, absent
from hylo.errors import HyloError

DataOption = Annotated[list[str], typer.Option("--data", help="text file, folder, or python-stdlib; repeatable")]
FactsOption = Annotated[float, typer.Option(help="share of rows with synthetic retrieval", min=0, max=1)]

# What fixes an extension's rows, for hylo extend and hylo teacher-cache alike.
EXTENSION: dict[str, Any] = {"length": 8192, "tokens": 8_000_000_000, "rows": 32, "facts": 0.0, "seed": 0}
EXTENSION |= {"precision": "bf16"}


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
) -> None:
    """Stage 1: every layer learns to do what the base's layer does, fed the base's hidden states."""
    from hylo.distill.align import align as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    absent(out)
    training = training_of(
        length=length, tokens=tokens, rows=rows, learning_rate=learning_rate, precision=precision, seed=seed
    )
    source = TrainingData(Data(text=data, facts=facts), read_tokenizer(student))
    run(base, student, out, source.rows("align", seed), training)
    shared.console.print(f"wrote {out}")


def extend(
    student: Annotated[Path, typer.Argument(help="directory written by convert, align or extend")],
    out: OutArgument,
    teacher: Annotated[
        Path | None, typer.Option(help="directory of the teacher: the base, or a larger model of its family")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="text file, folder, or python-stdlib; repeatable")
    ] = None,
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
    yarn_original: Annotated[int, typer.Option(help="context above which YaRN stretches positions", min=1)] = 2048,
    precision: Annotated[Precision | None, typer.Option(help="default bf16, or the cache's")] = None,
    seed: Annotated[int | None, typer.Option(help="of the rows; default 0, or the cache's")] = None,
    frozen_head: Annotated[
        bool, typer.Option("--frozen-head", help="train all but the head, as from a cache; a tied one is untied")
    ] = False,
) -> None:
    """Stage 2: distils the whole hybrid from a teacher at a longer context, with YaRN on the MLA layers."""
    from hylo.distill.extend import extend as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    absent(out)
    given = {"length": length, "tokens": tokens, "rows": rows, "facts": facts, "seed": seed, "precision": precision}
    if teacher_cache is not None:
        if teacher is not None:
            raise HyloError("give either --teacher with --data, or --teacher-cache, not both; leave one of them out")
        _extend_from_cache(student, out, teacher_cache, data, given, learning_rate, yarn_original)
    else:
        if teacher is None or not data:
            raise HyloError("extend needs either --teacher and --data, or --teacher-cache; give one of the two")
        values = EXTENSION | {key: value for key, value in given.items() if value is not None}
        text = Data(text=data, facts=values.pop("facts"))
        training = training_of(**values, learning_rate=learning_rate)
        source = TrainingData(text, read_tokenizer(student))
        rows_of = source.rows("extend", training.seed)
        run(student, teacher, out, rows_of, training, yarn_original, shared.console, frozen_head)
    shared.console.print(f"wrote {out}")


def _extend_from_cache(
    student: Path,
    out: Path,
    cache: Path,
    data: list[str] | None,
    given: dict[str, Any],
    learning_rate: float,
    yarn_original: int,
) -> None:
    """What is not given is the cache's; what is given must be the cache's."""
    from hylo.distill.cache import TeacherCache
    from hylo.distill.extend import extend_from_cache as run
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

    held = TeacherCache(cache)
    held.check_order(**{key: value for key, value in given.items() if key != "precision"})
    own = held.recipe.model_dump() | {"tokens": held.recipe.tokens}
    given = {key: own[key] if value is None else value for key, value in given.items()}
    facts = given.pop("facts")
    training = training_of(**given, learning_rate=learning_rate)
    rows = None
    if data:
        rows = TrainingData(Data(text=data, facts=facts), read_tokenizer(student)).rows("extend", training.seed)
    run(student, cache, out, training, yarn_original, rows, shared.console)


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
) -> None:
    """Runs a teacher over an extension's rows and keeps what it says, one vector a token; a second call goes on."""
    from hylo.distill.cache_writer import CacheSettings, write_teacher_cache
    from hylo.pipeline import TrainingData, read_tokenizer
    from hylo.recipe import Data

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
    source = TrainingData(Data(text=data, facts=facts), read_tokenizer(student))
    shard_bytes = int(shard_gib * 2**30)
    write_teacher_cache(teacher, student, out, source.rows("extend", seed), settings, shared.console, shard_bytes)
    shared.console.print(f"wrote {out}")


def training_of(**values: Any) -> Any:
    from hylo.distill.settings import Training

    return validated(Training, **values)


def validated(model: type[BaseModel], **values: Any) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise HyloError(f"--{option} {first['input']}: {first['msg']}") from None
