"""hylo evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from hylo.commands import shared
from hylo.commands.shared import Precision, indices


def evaluate(
    model: Annotated[Path, typer.Argument(help="Llama, Qwen2.5, Qwen3 or hylo directory")],
    teacher: Annotated[Path | None, typer.Option(help="also measure KL to this model")] = None,
    lengths: Annotated[str, typer.Option(help="contexts in tokens")] = "2048,8192",
    text: Annotated[list[str] | None, typer.Option(help="held-out text file or folder; default python-stdlib")] = None,
    answers: Annotated[int, typer.Option(help="needle questions a length", min=1)] = 256,
    answers_per_bin: Annotated[bool, typer.Option("--answers-per-bin", help="that many in every depth bin")] = False,
    tokens: Annotated[int, typer.Option(help="tokens of text a length", min=1)] = 32768,
    precision: Annotated[Precision, typer.Option()] = "float32",
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the result here")] = None,
) -> None:
    """Measures perplexity, KL to a teacher and needle retrieval, by length and depth."""
    from hylo.checkpoint import read_tokenizer
    from hylo.data.retrieval import FactFormat
    from hylo.data.sources import STANDARD_LIBRARY, whole_stream
    from hylo.evaluate.evaluate import evaluate as run
    from hylo.evaluate.evaluate import print_results
    from hylo.files import write_json

    tokenizer = read_tokenizer(model)
    result = run(
        model,
        teacher,
        indices(lengths) or [],
        whole_stream(tokenizer, text or [STANDARD_LIBRARY]),
        FactFormat.of(tokenizer),
        answers,
        tokens,
        answers_per_bin=answers_per_bin,
        seed=seed,
        precision=precision,
    )
    print_results({model.name: result}, shared.console)
    if json_file:
        write_json(json_file, result)
