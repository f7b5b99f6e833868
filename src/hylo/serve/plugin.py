"""vLLM's entry point (`vllm.general_plugins`): makes plain `vllm serve DIR` and `vllm.LLM(DIR)` know hylo directories.

vLLM calls `register` in each of its processes, sometimes more than once.
"""

from typing import Any

from transformers import AutoConfig

from hylo.errors import HyloError
from hylo.modeling.configuration import HyloConfig
from hylo.serve.versions import check_vllm

ARCHITECTURE = "HyloForCausalLM"


def register() -> None:
    try:
        check_vllm()
    except HyloError as error:
        AutoConfig.register("hylo", _refused(str(error)), exist_ok=True)  # said when a hylo directory is loaded
        return
    AutoConfig.register("hylo", HyloConfig, exist_ok=True)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from hylo.serve.engine_config import HyloArchitecture, HyloEngineConfig

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"hylo.serve.model:{ARCHITECTURE}")
    MODEL_ARCH_CONFIG_CONVERTORS["hylo"] = HyloArchitecture
    MODELS_CONFIG_MAP[ARCHITECTURE] = HyloEngineConfig


def _refused(reason: str) -> type[HyloConfig]:
    class RefusedConfig(HyloConfig):
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            raise ValueError(reason)

    return RefusedConfig
