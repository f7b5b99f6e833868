"""What a training stage can be told; the same for alignment and extension."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Precision = Literal["float32", "bf16"]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Training(BaseModel):
    """One stage: AdamW, a linear warm-up, then a cosine to zero; a step is `rows` sequences of `length` tokens.

    Raises pydantic.ValidationError on unknown keys and on values out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(gt=0, description="tokens to train on, rounded down to whole steps (at least one)")
    length: int = Field(gt=0, description="tokens of a sequence")
    rows: int = Field(gt=0, description="sequences of a step")
    learning_rate: float = Field(gt=0, allow_inf_nan=False, description="at the end of the warm-up")
    warmup: Fraction = Field(0.01, description="fraction of the steps")
    schedule: Literal["cosine"] = "cosine"
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False, description="largest gradient norm; alignment's is per layer")
    precision: Precision = Field("float32", description="bf16 computes in bf16 on float32 weights")
    seed: int = Field(0, ge=0)
    gradient_checkpointing: bool = Field(False, description="extension only: recompute each layer in the backward pass")

    @property
    def steps(self) -> int:
        return max(1, self.tokens // (self.rows * self.length))
