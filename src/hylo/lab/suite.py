"""A suite: one question, the arms that answer it (a recipe and what each sets otherwise), and the seeds of each."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hylo.errors import HyloError
from hylo.recipe import Recipe, one_line, overrides_of, read_recipe
from hylo.recipe_files import read_yaml

METRICS = {  # what an evaluation says, and whether less of it is better
    "kl": ("KL to the teacher", True),
    "needle": ("needle accuracy", False),
    "perplexity": ("perplexity", True),
}
ArmName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class Arm(BaseModel):
    """The suite's recipe, or its own, with `set` over it. `x` and `line` place it in a figure with an axis."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str = ""
    note: str = ""
    recipe: Path | None = None
    set: dict[str, Any] = {}
    as_published: bool = False
    x: float | None = None
    line: str = ""


class Metric(BaseModel):
    """`kl@2048`: of the run's last model; `converted:kl@2048`: of another of its models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    model: str | None
    figure: str
    length: int

    @classmethod
    def parse(cls, key: str) -> "Metric":
        """Raises ValueError for what no evaluation says."""
        model, _, rest = key.rpartition(":")
        figure, _, length = rest.partition("@")
        if figure not in METRICS or not length.isdecimal():
            raise ValueError(f"metric {key} is not understood; write one of {', '.join(METRICS)} and a length: kl@2048")
        return cls(key=key, model=model or None, figure=figure, length=int(length))

    @property
    def label(self) -> str:
        of = f", {self.model}" if self.model else ""
        return f"{METRICS[self.figure][0]} at {self.length}{of}"

    @property
    def lower_is_better(self) -> bool:
        return METRICS[self.figure][1]


class Suite(BaseModel):
    """`seeds` is a list, or how many from 0 on; `set` goes for all arms, and each arm's own comes after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str = ""
    recipe: Path
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    baseline: ArmName
    metrics: list[str] = Field(min_length=1)
    set: dict[str, Any] = {}
    arms: dict[ArmName, Arm] = Field(min_length=1)
    axis: str = Field("", description="what the arms' x means")

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @model_validator(mode="after")
    def _agrees(self) -> "Suite":
        if self.baseline not in self.arms:
            raise ValueError(f"baseline: {self.baseline} is none of the arms ({', '.join(self.arms)})")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} name one twice; name each once")
        for key in self.metrics:
            Metric.parse(key)
        return self

    @property
    def measured(self) -> list[Metric]:
        return [Metric.parse(key) for key in self.metrics]


def read_suite(path: Path) -> Suite:
    """Raises HyloError, in one line, for a file that is no suite. Relative paths are taken from its folder."""
    values = read_yaml(path, "suite")
    arms = values.get("arms")
    if isinstance(arms, dict):
        values["arms"] = {str(name): {} if arm is None else arm for name, arm in arms.items()}
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        raise HyloError(f"suite {path}: {one_line(error)}") from None
    folder = path.resolve().parent
    arms = {
        name: arm.model_copy(update={"recipe": (folder / (arm.recipe or suite.recipe)).resolve()})
        for name, arm in suite.arms.items()
    }
    return suite.model_copy(update={"recipe": (folder / suite.recipe).resolve(), "arms": arms})


def recipe_of(suite: Suite, path: Path, name: str, seed: int) -> Recipe:
    """The recipe of one arm with one seed; of the suite that was read from `path`. HyloError names the arm."""
    arm = suite.arms[name]
    assert arm.recipe is not None
    overrides = overrides_of(suite.set | arm.set | {"seed": seed}, arm.as_published)
    try:
        return read_recipe(arm.recipe, overrides, path.resolve().parent)
    except HyloError as error:
        raise HyloError(f"arm {name}: {error}") from None
