from typing import Any

import pytest
from pydantic import ValidationError

from hylo.distill.settings import Training

GOOD: dict[str, Any] = {"tokens": 1000, "length": 16, "rows": 4, "learning_rate": "2e-4"}


def test_steps_are_whole_and_at_least_one() -> None:
    assert Training(**GOOD).steps == 15
    assert Training(**GOOD | {"tokens": 3}).steps == 1
    assert Training(**GOOD).learning_rate == 2e-4  # what YAML reads as a string


@pytest.mark.parametrize(
    "bad",
    [
        {"tokens": 0},
        {"tokens": 1.5},
        {"length": -1},
        {"rows": 0},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"warmup": 1.0},
        {"betas": [0.9, 1.0]},
        {"schedule": "triangular"},
        {"precision": "fp8"},
        {"clip": 0},
        {"epochs": 3},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        Training(**GOOD | bad)
    assert error.value.errors()[0]["loc"][0] == next(iter(bad))
