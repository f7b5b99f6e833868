"""The schema of a recipe: one YAML file that takes a base checkpoint through its stages to an evaluated hybrid."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hylo.convert import Init, LinearInit, RopeKey
from hylo.data.settings import Data
from hylo.distill.settings import Stage
from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm, Positions
from hylo.plan import Plan, make_plan
from hylo.recipe_files import MODELS, dump_yaml, is_hub_name, read_values, snapshot

Length = Annotated[int, Field(gt=0)]
# A run's other directories.
OWN = ("converted", "stretched", "control", "no_alignment", "evaluations", "caches", "data")
# What the paper and its released models have where this project's defaults differ; docs/evidence.md has the reasons.
PUBLISHED = {
    "init": "recipe",
    "rope_key": "mean",
    "linear_init": "recipe",
    "calibration_tokens": 0,
    "data.boundaries": False,
}


class Evaluation(BaseModel):
    """At each length: `answers` needle questions (per depth bin with `answers_per_bin`) and `tokens` of plain text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lengths: list[Length] = Field(min_length=1)
    answers: int = Field(256, ge=1)
    answers_per_bin: bool = False
    tokens: int = Field(32768, gt=0)
    precision: Literal["float32", "bf16"] = "float32"


class Recipe(BaseModel):
    """A whole run: each of `stages` reads the model before it and writes RUN/`stage.directory`.

    `base` and `teacher` are absolute paths, or relative ones, `owner/name`, where they are still to come from the Hub.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path
    teacher: Path | None = Field(None, description="of all stages but those of objective layers; the base if left out")
    layout: str
    mla_layers: list[int] | None = None
    geometry: dict[str, int] = {}
    init: Init = "pairs-best"
    rope_key: RopeKey | None = None
    k_norm: KNorm = "exact"
    positions: Positions = Field("rope", description="none: attention rotates nothing; hype: linear blocks do instead")
    attention_gate: bool = Field(False, description="MLA's output through a sigmoid gate")
    rank: int | str | None = Field(None, description="kv_lora_rank: a number, or energy=0.95 for each layer's own")
    linear_init: LinearInit | None = None
    linear_fraction: float | None = Field(None, gt=0)
    linear_steps: int = Field(300, ge=0)
    calibration_tokens: int = Field(0, ge=0, description="of the training text, to run the base on at conversion")
    calibration_length: Length = 512
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="the base's if left out")
    data: Data
    yarn_original_length: Length | None = Field(
        None, description="context above which YaRN stretches the MLA layers' positions; the base's if left out"
    )
    stages: list[Stage] = Field(min_length=1)
    stretch: Length | None = Field(None, description="after them, untrained: the context, and YaRN, as of this length")
    evaluate: Evaluation
    controls: bool = Field(False, description="also train a random-mixer control and one without alignment")
    seed: int = Field(0, ge=0, description="of what is drawn at random, in the stages too that name no other")

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(stages := values.get("stages"), list):
            return values
        seed = {"seed": values.get("seed", 0)}
        return values | {"stages": [seed | stage if isinstance(stage, dict) else stage for stage in stages]}

    @model_validator(mode="after")
    def _stages_agree(self) -> "Recipe":
        longest, others, names = 0, "", dict[str, int]()
        for i, stage in enumerate(self.stages):
            at = f"stages.{i}"
            if stage.yarn_factor is not None and self.positions != "rope":
                raise ValueError(f"{at}.yarn_factor: positions {self.positions} have nothing to stretch; leave it out")
            if stage.directory in OWN:
                raise ValueError(f"{at}.name: a run calls another directory {stage.directory}; choose another name")
            if stage.directory in names:
                raise ValueError(
                    f"{at}.name: stages.{names[stage.directory]} is called {stage.directory} already; give it a name"
                )
            names[stage.directory] = i
            if stage.kind == "layers" and others:
                raise ValueError(f"{at}.objective: layers after {others}; align the layers first")
            if stage.kind != "layers":
                others = others or stage.kind
            if stage.kind == "distill":
                if stage.length < longest:
                    raise ValueError(f"{at}.length: {stage.length} after {longest}; lengths must not fall")
                longest = stage.length
        if self.stretch is not None and self.stretch < longest:
            raise ValueError(f"stretch: {self.stretch} after {longest}; lengths must not fall")
        self.parts()
        return self

    @field_validator("rank")
    @classmethod
    def _rank_is_understood(cls, rank: int | str | None) -> int | str | None:
        try:
            parse_rank(rank)
        except HyloError as error:
            raise ValueError(str(error)) from None
        return rank

    @property
    def extension_teacher(self) -> Path:
        return self.teacher or self.base

    def parts(self) -> list[tuple[float, float]]:
        """Which part of the data each stage reads, [start, end) of 0 to 1: its share, else what is left, by tokens.

        Preferences are data of their own: a dpo stage has (0, 1) of them. Raises ValueError for shares above 1.
        """
        reading = [stage for stage in self.stages if stage.kind != "dpo"]
        given = sum(stage.share or 0 for stage in reading)
        unnamed = sum(stage.tokens for stage in reading if stage.share is None)
        if given > 1 + 1e-9 or (unnamed and given > 1 - 1e-9):
            rest = ", and the stages without one have none left" if unnamed else ""
            raise ValueError(f"stages: their shares add up to {given:g}{rest}; at most 1 is there")
        parts, start = [], 0.0
        for stage in self.stages:
            if stage.kind == "dpo":
                parts.append((0.0, 1.0))
                continue
            end = start + (stage.share or (1 - given) * stage.tokens / unnamed)
            parts.append((start, min(end, 1.0)))
            start = end
        return parts

    def plan(self) -> Plan:
        """Of its conversion; ranks by `energy` are still the geometry's. Needs the models to be directories.

        Raises HyloError as `make_plan` does.
        """
        rank, _ = parse_rank(self.rank)
        return make_plan(
            self.base,
            self.layout,
            self.mla_layers,
            self.geometry | ({} if rank is None else {"kv_lora_rank": rank}),
            self.dtype,
            k_norm=self.k_norm,
            positions=self.positions,
            attention_gate=self.attention_gate,
        )

    @property
    def energy(self) -> float | None:
        """The share of squared singular values that every MLA layer's rank is to keep, if ranks go by that."""
        return parse_rank(self.rank)[1]

    def with_models(self, weights: bool = True) -> "Recipe":
        """The same with every Hub name replaced by the directory that it was downloaded to, if asked without weights.

        Raises HyloError, with how to mend it, where the Hub cannot be reached or has no such model.
        """
        models = {key: getattr(self, key) for key in MODELS}
        update = {key: snapshot(path, weights) for key, path in models.items() if path and is_hub_name(path)}
        return self.model_copy(update=update)


def read_recipe(path: Path, overrides: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """Reads and checks a recipe, with `a.b=c` of `overrides` set; what it `extends` is read first.

    Relative paths in `overrides` are taken from `folder`, or else from the recipe's own.
    HyloError names every unknown key and bad value with its path, in one line.
    """
    values = read_values(path, overrides, folder)
    if not values:
        raise HyloError(f"recipe {path} holds no keys; write at least {', '.join(required_keys())}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise HyloError(f"recipe {path}: {one_line(error)}") from None


def overrides_of(settings: Mapping[str, Any], as_published: bool = False) -> list[str]:
    """Keys and values as `read_recipe` takes them, after the published ones if those are asked for."""
    both = (PUBLISHED if as_published else {}) | dict(settings)
    return [f"{key}={json.dumps(value)}" for key, value in both.items()]


def parse_rank(rank: int | str | None) -> tuple[int | None, float | None]:
    """A number or a share of energy, written energy=0.95: one of the two, or neither. Raises HyloError for others."""
    if rank is None:
        return None, None
    name, _, value = str(rank).rpartition("=")
    try:
        if name not in ("", "energy"):
            raise ValueError
        return (int(value), None) if name == "" else (None, float(value))
    except ValueError:
        raise HyloError(f"rank {rank} is not understood; write a number, or a share such as energy=0.95") from None


def required_keys() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if field.is_required()]


def dump_recipe(recipe: Recipe) -> str:
    return dump_yaml(recipe.model_dump(mode="json"))


def one_line(error: ValidationError) -> str:
    """Each problem as `path.to.key: what is wrong`."""
    problems = []
    for item in error.errors():
        message, at = item["msg"].removeprefix("Value error, "), ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            message = "unknown key; remove it or check its spelling"
        elif item["type"] not in ("missing", "value_error"):
            message += f" (got {item['input']!r})"
        problems.append(f"{at}: {message}" if at else message)  # what several keys say together names them itself
    return "; ".join(problems)
