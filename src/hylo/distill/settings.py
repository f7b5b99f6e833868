"""What a training stage can be told; the same for alignment, distillation and preference optimisation."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["float32", "bf16"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]  # from a teacher's distribution, position by position
Objective = Literal["layers", "forward_kl", "reverse_kl", "jsd", "cross_entropy", "on_policy", "dpo"]
Teacher = Literal["live", "cache", "none"]
Trains = Literal["all", "all_but_head", "mixers"]
Positions = Literal["yarn", "unscaled"]
LayerLoss = Literal["hidden+mixer", "hidden", "mixer"]  # of stage 1: which of a layer's outputs are compared

DIVERGENCES = get_args(Divergence)
MIXABLE = (*DIVERGENCES, "cross_entropy")


class Training(BaseModel):
    """One stage: AdamW, a linear warm-up, then the schedule; a step is `rows` sequences of `length` tokens.

    Raises pydantic.ValidationError on unknown keys, on values out of range and on settings that contradict each other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(gt=0, description="tokens to train on, rounded down to whole steps (at least one)")
    length: int = Field(gt=0, description="tokens of a sequence")
    rows: int = Field(gt=0, description="sequences of a step, over all devices")
    micro_rows: int | None = Field(None, gt=0, description="of them at once on a device; gradients are accumulated")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="at the end of the warm-up")
    warmup: Fraction = Field(0.01, description="fraction of the steps")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up, down to zero")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False, description="largest gradient norm; alignment's is per layer")
    precision: Precision = Field("float32", description="bf16 computes in bf16 on float32 weights")
    seed: int = Field(0, ge=0)
    gradient_checkpointing: bool = Field(False, description="recompute each layer in the backward pass; not in layers")

    objective: dict[Objective, float] = Field(
        {"forward_kl": 1.0}, description="what is minimised: a name, or names with weights"
    )
    teacher: Teacher | None = Field(None, description="runs in every step, has left a cache, or is not needed")
    trains: Trains = Field("all", description="layers: always all of the layers that differ from the base's")
    positions: Positions = Field("yarn", description="of MLA beyond the length that YaRN starts from")
    yarn_factor: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="length over that length if left out"
    )
    layer_loss: LayerLoss = Field("hidden+mixer", description="layers only: what of a layer is compared")
    layers_at_once: int | None = Field(
        None, gt=0, description="layers only: layers in memory at a time; all if left out"
    )
    share: Share | None = Field(None, description="of the data; by tokens if left out")

    save_every: int | None = Field(None, gt=0, description="steps between checkpoints; a twentieth of them if left out")
    keep: int = Field(2, gt=0, description="checkpoints that stay")
    bad_batches: int = Field(10, ge=0, description="batches without a finite loss and gradient that may be skipped")

    beta: float | None = Field(None, gt=0, allow_inf_nan=False, description="of jsd (0.5), on_policy (1), dpo (0.01)")
    new_tokens: int = Field(128, gt=0, description="on_policy: tokens that the student writes")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.rows * self.length))

    @property
    def save_steps(self) -> int:
        return self.save_every or max(1, self.steps // 20)

    @property
    def kind(self) -> str:
        """layers, on_policy, dpo, or distill for all that compare distributions or text at every position."""
        only = next(iter(self.objective))
        return only if only not in MIXABLE else "distill"

    @property
    def objective_text(self) -> str:
        """`forward_kl`, or `0.9 forward_kl + 0.1 cross_entropy`."""
        if len(self.objective) == 1:
            return next(iter(self.objective))
        return " + ".join(f"{weight:g} {name}" for name, weight in self.objective.items())

    @property
    def teacher_source(self) -> Teacher:
        needs = self.kind in ("layers", "on_policy") or any(name in DIVERGENCES for name in self.objective)
        return self.teacher or ("live" if needs else "none")

    @model_validator(mode="before")
    @classmethod
    def _objective_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("objective"), str):
            return values | {"objective": {values["objective"]: 1.0}}
        return values

    @model_validator(mode="after")
    def _agrees(self) -> "Training":
        names = list(self.objective)
        if not names or any(weight <= 0 for weight in self.objective.values()):
            raise ValueError("objective needs at least one name, each with a weight above 0")
        if len(names) > 1 and (alone := [name for name in names if name not in MIXABLE]):
            raise ValueError(f"objective {alone[0]} stands alone; only {', '.join(MIXABLE)} mix")
        needs_teacher = self.kind in ("layers", "on_policy") or any(name in DIVERGENCES for name in names)
        if needs_teacher and self.teacher == "none":
            raise ValueError(f"objective {' + '.join(names)} compares with a teacher, and teacher is none")
        if not needs_teacher and self.teacher in ("live", "cache"):
            raise ValueError(f"objective {' + '.join(names)} has no use for a teacher; leave teacher out")
        if self.teacher == "cache":
            if names != ["forward_kl"]:
                raise ValueError("a teacher cache holds what forward_kl needs, and only that")
            if self.trains != "all_but_head":
                raise ValueError("a teacher cache holds for one head: write trains: all_but_head")
        if self.layers_at_once is not None and self.kind != "layers":
            raise ValueError("layers_at_once is for objective layers")
        if self.layer_loss != "hidden+mixer" and self.kind != "layers":
            raise ValueError("layer_loss is for objective layers")
        if self.kind == "layers" and self.trains != "all":
            raise ValueError("objective layers trains whole layers; leave trains out")
        if self.micro_rows is not None and self.rows % self.micro_rows:
            raise ValueError(f"rows {self.rows} are no multiple of micro_rows {self.micro_rows}")
        if self.beta is not None:
            if not {"jsd", "on_policy", "dpo"} & set(names):
                raise ValueError("beta is for objectives jsd, on_policy and dpo; leave it out")
            if ("jsd" in names and self.beta >= 1) or (self.kind == "on_policy" and self.beta > 1):
                raise ValueError(f"beta {self.beta} is no weight of the teacher's in a mixture; write one below 1")
        if self.positions == "unscaled" and self.yarn_factor is not None:
            raise ValueError("yarn_factor is for positions yarn")
        return self


class Stage(Training):
    """A training stage of a recipe: it reads the directory before it and writes RUN/`name`."""

    name: str = Field("", pattern=r"^[a-z0-9][a-z0-9._-]*$|^$", description="of its directory; by objective and length")

    @property
    def directory(self) -> str:
        if self.name:
            return self.name
        return {
            "layers": "aligned",
            "distill": f"extended-{self.length}",
            "on_policy": f"on-policy-{self.length}",
            "dpo": "dpo",
        }[self.kind]
