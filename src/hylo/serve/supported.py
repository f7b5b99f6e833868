"""Which hybrids vLLM can serve: what its attention cannot express is refused before anything is loaded."""

from hylo.errors import HyloError
from hylo.modeling.configuration import HyloConfig


def check_servable(config: HyloConfig, tensor_parallel: int = 1) -> None:
    """Raises HyloError for a hybrid, or a number of devices to cut it into, that the plugin does not serve."""
    if {"attention", "mla"} <= set(config.mixers):
        raise HyloError("MLA and the base's attention in one model cannot share vLLM's cache; keep one of the two")
    if "mla" in config.mixers and config.qk_norm and config.mla_k_norm == "exact":
        raise HyloError(
            "MLA with Qwen3's exact key norm has no kernel in vLLM; convert with --k-norm folded --calibrate TEXT"
        )
    if config.positions == "hype":
        raise HyloError(
            "positions hype have no kernels in vLLM, whose linear blocks rotate nothing; generate with transformers, "
            "or train with positions none"
        )
    figures = _cut_figures(config)
    for figure, number in figures.items():
        if not _shared_out(figure, number, tensor_parallel):
            fits = [
                str(devices)
                for devices in range(1, max(figures.values()) + 1)
                if all(_shared_out(*entry, devices) for entry in figures.items())
            ]
            raise HyloError(
                f"{figure} is {number}, which {tensor_parallel} devices cannot share; possible here: {', '.join(fits)}"
            )


def check_state_dtype(config: HyloConfig, state_dtype: str, platform: str) -> None:
    """Raises HyloError for states that vLLM's kernels do not keep in this dtype."""
    if "kda" in config.mixers and platform == "cuda" and state_dtype != "float32":
        raise HyloError(f"vLLM's KDA has states in float32 on GPUs, not in {state_dtype}; leave --state-dtype out")


def _shared_out(figure: str, number: int, devices: int) -> bool:
    """Every device gets as many; of the base's kv heads each may also serve several devices."""
    return number % devices == 0 or (figure == "num_key_value_heads" and devices % number == 0)


def _cut_figures(config: HyloConfig) -> dict[str, int]:
    """What tensor parallelism cuts, by the mixers at hand."""
    figures = {"intermediate_size": config.intermediate_size}
    if {"attention", "mla"} & set(config.mixers):
        figures["num_attention_heads"] = config.num_attention_heads
    if "attention" in config.mixers:
        figures["num_key_value_heads"] = config.num_key_value_heads
    if "gated_deltanet" in config.mixers:
        figures["gdn_num_heads"] = config.gdn_num_heads
    if "kda" in config.mixers:
        figures["kda_num_heads"] = config.kda_num_heads
    if "mamba2" in config.mixers:
        figures["mamba_num_heads"] = config.mamba_num_heads
        figures["mamba_d_xb / mamba_head_dim"] = config.mamba_d_xb // config.mamba_head_dim
    return figures


def served_rank(config: HyloConfig) -> int:
    """kv_lora_rank in the engine, whose layers must agree: the largest, to which the others are padded with zeros."""
    return max(config.kv_rank(i) for i, mixer in enumerate(config.mixers) if mixer == "mla")


def cached_width(config: HyloConfig) -> int:
    """Values that an MLA layer caches per token in the engine: the latent and the rotated key."""
    return served_rank(config) + config.qk_rope_head_dim
