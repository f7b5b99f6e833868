"""The schema of a recipe: one YAML file that takes a base checkpoint to an evaluated hybrid."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hylo.convert import Init, LinearInit, RopeKey
from hylo.data.sources import STANDARD_LIBRARY
from hylo.distill.settings import Training
from hylo.errors import HyloError
from hylo.modeling.configuration import KNorm

Length = Annotated[int, Field(gt=0)]


class Data(BaseModel):
    """`text`: files, folders or python-stdlib; `held_out`: text to evaluate on, otherwise a twentieth of `text`;
    `facts`: the share of training rows that carry synthetic retrieval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[str] = Field(min_length=1)
    held_out: list[str] = []
    facts: float = Field(0.0, ge=0, le=1)


class Evaluation(BaseModel):
    """At each length: `answers` needle questions (per depth bin with `answers_per_bin`) and `tokens` of plain text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lengths: list[Length] = Field(min_length=1)
    answers: int = Field(256, ge=1)
    answers_per_bin: bool = False
    tokens: int = Field(32768, gt=0)
    precision: Literal["float32", "bf16"] = "float32"


class Recipe(BaseModel):
    """A whole run. Relative paths are taken from the recipe's own folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Path
    teacher: Path | None = Field(None, description="teacher of the extension; the base if left out")
    layout: str
    mla_layers: list[int] | None = None
    geometry: dict[str, int] = {}
    init: Init = "pairs-fast"
    rope_key: RopeKey | None = None
    k_norm: KNorm = "exact"
    rank: int | str | None = Field(None, description="kv_lora_rank: a number, or energy=0.95 for each layer's own")
    linear_init: LinearInit | None = None
    linear_fraction: float | None = Field(None, gt=0)
    linear_steps: int = Field(300, ge=0)
    calibration_tokens: int = Field(0, ge=0, description="of the training text, to run the base on at conversion")
    calibration_length: Length = 512
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="the base's if left out")
    data: Data
    align: Training
    extend: list[Training] = Field(min_length=1)
    yarn_original_length: Length = Field(description="context above which YaRN stretches the MLA layers' positions")
    evaluate: Evaluation
    controls: bool = Field(False, description="also train a random-mixer control and one without alignment")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _lengths_grow(self) -> "Recipe":
        lengths = [stage.length for stage in self.extend]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"extend lengths must grow, got {lengths}")
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


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe. HyloError names every unknown key and bad value with its path, in one line."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HyloError(f"recipe {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise HyloError(f"recipe {path} cannot be read ({error}); check the file") from error
    except yaml.YAMLError as error:
        raise HyloError(f"recipe {path} is not YAML ({' '.join(str(error).split())}); mend the file") from error
    if not isinstance(values, dict):
        raise HyloError(f"recipe {path} holds no keys; write at least {', '.join(required_keys())}")
    try:
        return _resolve(Recipe.model_validate(values), path.parent)
    except ValidationError as error:
        raise HyloError(f"recipe {path}: {_one_line(error)}") from None


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
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    def text(source: str) -> str:
        return source if source == STANDARD_LIBRARY else str((folder / source).resolve())

    data = recipe.data.model_copy(
        update={"text": [text(s) for s in recipe.data.text], "held_out": [text(s) for s in recipe.data.held_out]}
    )
    update: dict[str, Any] = {"base": (folder / recipe.base).resolve(), "data": data}
    if recipe.teacher is not None:
        update["teacher"] = (folder / recipe.teacher).resolve()
    return recipe.model_copy(update=update)


def _one_line(error: ValidationError) -> str:
    """Each problem as `path.to.key: what is wrong`."""
    known = {"extra_forbidden": "unknown key; remove it or check its spelling"}
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or 'recipe'}: {known.get(item['type'], item['msg'])}"
        + (f" (got {item['input']!r})" if item["type"] not in ("missing", "extra_forbidden", "value_error") else "")
        for item in error.errors()
    )
