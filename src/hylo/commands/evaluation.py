"""hylo evaluate and hylo report."""

from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared
from hylo.commands.shared import Precision, lengths_of

FROM_HUB = ("ruler", "commonsense", "gsm8k")  # suites whose data may be there


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="directories, or NAME=DIR; a served model's http address")
    ],
    suite: Annotated[str, typer.Option(help="ruler, needle, commonsense, gsm8k, intrinsic")] = "needle,intrinsic",
    lengths: Annotated[
        str | None, typer.Option(help="in tokens, e.g. 2048,8k; these two if the context holds them")
    ] = None,
    beyond: Annotated[bool, typer.Option("--beyond-context", help="lengths that exceed a model's context too")] = False,
    teacher: Annotated[
        Path | None, typer.Option(help="intrinsic: also KL to this model, and mixer errors to it")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="held-out text file or folder; default python-stdlib")] = None,
    tokens: Annotated[int, typer.Option(help="intrinsic: tokens of text a length", min=1)] = 32768,
    answers: Annotated[int, typer.Option(help="needle: questions a length", min=1)] = 256,
    answers_per_bin: Annotated[bool, typer.Option("--answers-per-bin", help="that many at every depth")] = False,
    depths: Annotated[int, typer.Option(help="needle: depths, a needle of every row in each", min=1)] = 8,
    samples: Annotated[int, typer.Option(help="ruler: samples a task and length", min=1)] = 100,
    tasks: Annotated[str | None, typer.Option(help="ruler: some of the 13, e.g. niah_single_1,vt")] = None,
    essays: Annotated[Path | None, typer.Option(help="ruler: essays, else from the Hub")] = None,
    squad: Annotated[Path | None, typer.Option(help="ruler: SQuAD 2.0, else from the Hub")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="ruler: HotpotQA, else from the Hub")] = None,
    haystack: Annotated[Path | None, typer.Option(help="ruler: text in place of the essays; results say so")] = None,
    data: Annotated[Path | None, typer.Option(help="commonsense, gsm8k: folder of local copies")] = None,
    limit: Annotated[int | None, typer.Option(help="commonsense, gsm8k: samples a task", min=1)] = None,
    through: Annotated[str | None, typer.Option(help="lm-eval: its own ruler tasks")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="prompts in the tokenizer's chat template")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="of a served model: a directory that has it")] = None,
    with_published: Annotated[
        bool, typer.Option("--with-published", help="the paper's rows beside, as quoted")
    ] = False,
    precision: Annotated[Precision, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here, or add to them")] = None,
) -> None:
    """Measures models side by side: RULER, needles by length and depth, commonsense, GSM8K, perplexity and KL.

    Interrupted, the same command goes on with the sample it was at.
    """
    from hylo.data.settings import STANDARD_LIBRARY
    from hylo.evaluate.published import published_rows
    from hylo.evaluate.ruler import TASKS, Sources
    from hylo.evaluate.run import evaluate_suites, read_results, subjects_of, usual_lengths
    from hylo.evaluate.subject import Subject
    from hylo.evaluate.suites import Request, suites_of
    from hylo.evaluate.table import print_table
    from hylo.files import write_json
    from hylo.hub import offline_if_unreachable

    subjects = subjects_of(models, precision, tokenizer, beyond)
    request = Request(
        lengths=tuple(usual_lengths(subjects) if lengths is None else lengths_of(lengths, "--lengths")),
        seed=seed,
        text=tuple(text or [STANDARD_LIBRARY]),
        teacher=None if teacher is None else Subject(teacher.name, teacher, precision, beyond),
        tokens=tokens,
        answers=answers,
        answers_per_cell=answers_per_bin,
        depths=depths,
        samples=samples,
        tasks=tuple(TASKS if tasks is None else names_of(tasks)),
        sources=Sources(essays, squad, hotpotqa, hub=True, haystack=haystack),
        chat=chat,
        through=through,
        data=data,
        limit=limit,
    )
    names = names_of(suite)
    if any(name in FROM_HUB for name in names):
        offline_if_unreachable()
    suites = suites_of(names, request)
    known = read_results(json_file) if json_file and json_file.exists() else None
    result = evaluate_suites(subjects, suites, known)
    if with_published:
        result["published"] = published_rows()
    print_table(result, shared.console)
    if json_file:
        write_json(json_file, result)


def names_of(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def report(
    sources: Annotated[
        list[Path], typer.Argument(metavar="RUN|JSON...", help="runs, and results of hylo evaluate and hylo bench")
    ],
    out: Annotated[Path, typer.Option(help="directory of the report")] = Path("report"),
) -> None:
    """Draws one page of everything: tables, the paper's figures for these models, what got better and worse."""
    from hylo.report import report_of

    report_of(sources, out)
    shared.console.print(f"report: {out / 'report.html'}")
