"""Another supported length without training: YaRN's factor, and nothing else, is changed in a copy of the model."""

from pathlib import Path

from hylo.files import complete_directory, link_files
from hylo.modeling.loading import read_hylo_config


def stretch(student: Path, out: Path, length: int, yarn_original: int | None) -> None:
    """Writes the model in `student` for `length` tokens, its positions stretched from `yarn_original`, as `out`.

    None: from the length of the base. Its weights are linked, not copied. Raises HyloError if `student` is no hylo
    directory, or `out` exists.
    """
    config = read_hylo_config(student)
    config.extend_context(length, yarn_original)
    with complete_directory(out) as partial:
        link_files(student, partial, without=("config.json", "*.py", "metrics.jsonl", "logs"))
        config.save_pretrained(partial)
