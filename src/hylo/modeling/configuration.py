"""The configuration of a hybrid: the base's own figures, the mixer of every layer, and the mixers' geometry."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

MIXERS = ("attention", "mla", "gated_deltanet", "mamba2", "kda")
CACHE_KIND = {
    "attention": "full_attention",
    "mla": "full_attention",
    "gated_deltanet": "linear_attention",
    "mamba2": "linear_attention",
    "kda": "linear_attention",
}
Positions = Literal["rope", "none", "hype"]  # how layers know where a token stands: `HyloConfig.positions`
KNorm = Literal["exact", "folded"]  # of MLA on Qwen3: the norm as it is, or its mean multiplied into the weights
RELEASED = "hybrid_config.json"  # holds a released checkpoint's figures; its config.json is the base's
CODE = "modeling_hylo"  # the file that transformers takes the classes from, in a directory that it does not know
AUTO_MAP = {
    "AutoConfig": f"{CODE}.HyloConfig",
    "AutoModel": f"{CODE}.HyloModel",
    "AutoModelForCausalLM": f"{CODE}.HyloForCausalLM",
}


class HyloConfig(PreTrainedConfig):
    """`mixers` names each layer's token mixer, one of MIXERS. Widths and ranks are in values, lengths in tokens.

    `rope_parameters` is the base's RoPE (for `attention` layers), `mla_rope_parameters` that of MLA:
    {"rope_type": "default", "rope_theta"} or, after `extend_context`, YaRN's. `mla_inv_freq` lists every layer's
    inverse frequencies (None where the layer is no MLA) if they are no geometric sequence, and `rope_theta` is then the
    base's. `kv_lora_ranks` gives every layer a rank of its own. `max_position_embeddings` is the supported length,
    `base_max_position_embeddings` the base's.
    `positions`: `rope` rotates queries and keys of attention and MLA; `none` nothing; `hype` (arXiv 2601.22156) those
    of linear blocks, by the base's theta, and outside training it multiplies attention's logits by log_a(a + t) for the
    query at position t, from 0 on; a is `hype_scale`, or the supported length. `attention_gate`: MLA's output is gated.
    Raises ValueError if `mixers`, or one of those lists, does not fit the layers, and for unknown `positions`.
    """

    model_type = "hylo"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    base_max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    base_model_type: str = "llama"
    qk_norm: bool = False
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # set by __post_init__, as the next
    mixers: list[str] = None  # type: ignore[assignment]

    kv_lora_rank: int = 64
    q_lora_rank: int = 192
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    mla_k_norm: KNorm = "exact"
    mla_rope_parameters: dict[str, Any] = None  # type: ignore[assignment]
    mla_inv_freq: list[list[float] | None] | None = None
    kv_lora_ranks: list[int] | None = None
    positions: Positions = "rope"
    hype_scale: int | None = None
    attention_gate: bool = False

    conv_kernel_size: int = 4
    gdn_num_heads: int = 2
    gdn_head_dim: int = 64
    gdn_expand_v: int = 2
    mamba_d_state: int = 64
    mamba_head_dim: int = 64
    mamba_num_heads: int = 4
    mamba_d_inner: int = 256
    mamba_d_xb: int = 128
    kda_num_heads: int = 4
    kda_head_dim: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("layer_types", None)  # derived
        if self.mixers is None:
            self.mixers = ["attention"] * self.num_hidden_layers
        if unknown := sorted(set(self.mixers) - set(MIXERS)):
            raise ValueError(f"unknown mixers {unknown}; known are {', '.join(MIXERS)}")
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"{len(self.mixers)} mixers for {self.num_hidden_layers} layers")
        for key in ("mla_inv_freq", "kv_lora_ranks"):
            if (entries := getattr(self, key)) is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(f"{key} has {len(entries)} entries for {self.num_hidden_layers} layers")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions {self.positions} are not known; known are {', '.join(get_args(Positions))}")
        if self.hype_scale is not None and self.hype_scale < 2:
            raise ValueError(f"hype_scale is {self.hype_scale}; it must be at least 2")
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if self.mla_rope_parameters is None:
            self.mla_rope_parameters = {"rope_type": "default", "rope_theta": self.rope_parameters["rope_theta"]}
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the code beside config.json that loads the directory where nobody imports this package."""
        self.auto_map = dict(AUTO_MAP)
        os.makedirs(save_directory, exist_ok=True)
        code = Path(__file__).with_name(f"{CODE}.py")  # imports the package; in a portable export, its neighbours
        for file in {code, *map(Path, get_relative_import_files(code))}:
            shutil.copyfile(file, Path(save_directory, file.name))
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing, or transformers' save_pretrained would add this file and an auto_map that names it."""

    def validate(self) -> None:
        """transformers' checks at saving but RoPE's, which would hold the base's lengths against the supported one."""
        self.validate_architecture()
        self.validate_layer_type()
        self.validate_token_ids()

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches and masks go by: `full_attention` layers cache every token, linear ones do not."""
        return [CACHE_KIND[mixer] for mixer in self.mixers]

    def kv_rank(self, layer_idx: int) -> int:
        """kv_lora_rank of one layer."""
        return self.kv_lora_rank if self.kv_lora_ranks is None else self.kv_lora_ranks[layer_idx]

    def trained_at(self, length: int) -> None:
        """HyPE's factor grows from the length that was trained at last."""
        if self.positions == "hype":
            self.hype_scale = length

    def extend_context(self, length: int, original: int | None = None, factor: float | None = None) -> None:
        """Sets the supported length, and YaRN on the MLA layers where it exceeds the `original` length.

        `original`: the base's length if None, within which MLA turns as the base's attention did. `factor` stretches
        positions by other than length / original; 1 leaves them as they are, as do positions that are not `rope`.
        """
        theta = self.mla_rope_parameters["rope_theta"]
        original = original or self.base_max_position_embeddings or self.max_position_embeddings
        factor = length / original if factor is None else factor
        if factor > 1 and self.positions == "rope":
            self.mla_rope_parameters = {
                "rope_type": "yarn",
                "rope_theta": theta,
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 0.1 * math.log(factor) + 1,
            }
        else:
            self.mla_rope_parameters = {"rope_type": "default", "rope_theta": theta}
        self.max_position_embeddings = length
