"""A model under evaluation: its directory, what is known of it before any weight is read, and the model itself."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hylo.checkpoint import model_hash, read_tokenizer
from hylo.errors import HyloError
from hylo.modeling.loading import load_model, read_configuration

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """`name` is what tables call it; `precision` is "float32" or "bf16"; `beyond`: lengths may exceed the context.

    Reading a property may raise HyloError.
    """

    name: str
    directory: Path
    precision: str = "float32"
    beyond: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise HyloError(f"precision {self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")

    @cached_property
    def config(self) -> PreTrainedConfig:
        read_configuration(self.directory)
        return AutoConfig.from_pretrained(self.directory, local_files_only=True)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.directory)

    @cached_property
    def hash(self) -> str:
        return model_hash(self.directory)

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded when first asked for, on the GPU where there is one, ready to evaluate."""
        return load_model(self.directory, PRECISIONS[self.precision], self.device).eval()

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def context(self) -> int:
        """Tokens that the model is made for."""
        return int(self.config.max_position_embeddings)

    def release(self) -> None:
        """Lets the weights go."""
        self.__dict__.pop("model", None)

    def check_context(self, lengths: list[int], what: str) -> None:
        """Raises HyloError for a length beyond the model's context, unless that is asked for."""
        if lengths and max(lengths) > self.context and not self.beyond:
            raise HyloError(
                f"{what} at {max(lengths)} tokens exceeds the context of {self.name}, {self.context}; ask for shorter "
                "lengths, or to go --beyond-context"
            )

    def identity(self) -> dict[str, Any]:
        """Of the model, what an answer depends on beside its hash."""
        return {"precision": self.precision, "device": self.device}
