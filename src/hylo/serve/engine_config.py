"""What vLLM asks of a hybrid's configuration before any layer is made."""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import HybridAttentionMambaModelConfig, VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hylo.serve.supported import cached_width, check_servable, check_state_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SSD_CHUNK = 256  # tokens of a chunk of vLLM's Mamba-2 kernels


class HyloArchitecture(ModelArchConfigConvertorBase):
    """On CPUs a model is not announced as MLA: vLLM would force blocks of 16 tokens upon it, and whole prompts without
    a prefix cache, as its own kernels there need. Ours take any block (hylo.serve.latent), whose bytes follow from one
    head of `get_head_size` values without a value of its own."""

    def is_deepseek_mla(self) -> bool:
        return "mla" in self.hf_config.mixers and not current_platform.is_cpu()

    def get_head_size(self) -> int:
        return cached_width(self.hf_config) if "mla" in self.hf_config.mixers else super().get_head_size()


class HyloEngineConfig(VerifyAndUpdateConfig):
    @classmethod
    def verify_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        check_servable(config, vllm_config.parallel_config.tensor_parallel_size)
        config.mamba_chunk_size = SSD_CHUNK
        if cache.mamba_ssm_cache_dtype == "auto":  # would be the model's; the recurrences were trained in float32
            cache.mamba_ssm_cache_dtype = "float32"
        check_state_dtype(config, cache.mamba_ssm_cache_dtype, "cpu" if current_platform.is_cpu() else "cuda")
        if vllm_config.model_config.is_hybrid:
            HybridAttentionMambaModelConfig.verify_and_update_config(vllm_config)
