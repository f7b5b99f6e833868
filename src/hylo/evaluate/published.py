"""The published rows that a table shows beside what was measured, always marked as quoted."""

from importlib.resources import files
from typing import Any

import yaml


def published_rows() -> list[dict[str, Any]]:
    """{"model", "kv", "commonsense", "gsm8k", "ruler": {length, a string: score}, "source"} of each model."""
    table = yaml.safe_load(files("hylo.evaluate").joinpath("published.yaml").read_text(encoding="utf-8"))
    return [
        row
        | {"ruler": {str(length): float(score) for length, score in row["ruler"].items()}, "source": table["source"]}
        for row in table["rows"]
    ]
