"""The hybrid as a vLLM model: what hylo.modeling.model is in torch, of vLLM's layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator, MambaStateDtypeCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.v1.kv_cache_interface import MambaSpec

from hylo.checkpoint import names
from hylo.errors import HyloError
from hylo.modeling.configuration import HyloConfig
from hylo.modeling.loading import checkpoint_shapes
from hylo.modeling.rope import cos_sin, frequencies
from hylo.serve.attention import BaseAttention, LatentAttention, Rotary
from hylo.serve.kda import KimiDeltaAttention
from hylo.serve.linear import GatedDeltaNet, Mamba2
from hylo.serve.weights import Loaded

MIXER_CLASSES: dict[str, Any] = {
    "attention": BaseAttention,
    "mla": LatentAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
    "kda": KimiDeltaAttention,
}


class HyloForCausalLM(nn.Module, HasInnerState, IsHybrid):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: HyloConfig = vllm_config.model_config.hf_config
        config = self.config
        self.model = Decoder(vllm_config=vllm_config, prefix="model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises HyloError for a tensor that is missing, and for one that the configuration has no place for."""
        wanted, parameters, loaded, seen = checkpoint_shapes(self.config), dict(self.named_parameters()), set(), set()
        for name, tensor in weights:
            if name == "lm_head.weight" and name not in wanted:  # tied
                continue
            if name not in wanted:
                raise HyloError(f"the model directory holds unexpected {name}; restore it")
            if tuple(tensor.shape) != wanted[name]:
                raise HyloError(f"the model directory has {name} in another shape than config.json says; restore it")
            seen.add(name)
            for target, part, index in self._translated(name, tensor):
                parameter = parameters[target]
                loader = getattr(parameter, "weight_loader", default_weight_loader)
                loader(parameter, part) if index is None else loader(parameter, part, index)
                loaded.add(target)
        if missing := sorted(wanted.keys() - seen):
            raise HyloError(f"the model directory lacks {names(missing)}; restore it")
        for layer in self.model.layers:
            if isinstance(layer.mixer, GatedDeltaNet | Mamba2 | KimiDeltaAttention):
                layer.mixer.finish_loading()
        return loaded

    def _translated(self, name: str, tensor: Tensor) -> Iterable[Loaded]:
        if ".mixer." in name:
            layer, _, rest = name.partition(".mixer.")
            mixer: Any = self.get_submodule(f"{layer}.mixer")
            return [(f"{layer}.mixer.{target}", part, index) for target, part, index in mixer.translated(rest, tensor)]
        for index, half in enumerate(("gate_proj", "up_proj")):
            if f".{half}." in name:
                return [(name.replace(half, "gate_up_proj"), tensor, index)]
        return [(name, tensor, None)]

    @classmethod
    def get_mamba_specs_from_config(cls, vllm_config: VllmConfig) -> list[MambaSpec]:
        """The state of every kind of linear layer that the model has."""
        config, devices = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        dtypes = cls.get_mamba_state_dtype_from_config(vllm_config)
        kinds = [MIXER_CLASSES[mixer] for mixer in ("gated_deltanet", "mamba2", "kda") if mixer in config.mixers]
        return [MambaSpec(shapes=kind.state_shapes(config, devices), dtypes=dtypes, block_size=-1) for kind in kinds]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        specs = cls.get_mamba_specs_from_config(vllm_config)
        return max(specs, key=lambda spec: spec.page_size_bytes).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


@support_torch_compile
class Decoder(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: HyloConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix="model.embed_tokens")
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, i, f"model.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.turns: dict[str, tuple[str, float]] = {}  # a buffer's name and the factor, by kind of attention
        for kind, (inv_freq, factor) in frequencies(config).items():
            self.turns[kind] = f"inv_freq_{len(self.turns)}", factor
            self.register_buffer(self.turns[kind][0], inv_freq.to(torch.get_default_device()), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = {
            kind: cos_sin(getattr(self, name), factor, positions, x.dtype)
            for kind, (name, factor) in self.turns.items()
        }
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, rotary)
        return self.norm(x, residual)[0]


class DecoderLayer(nn.Module):
    """What it returns is still to be added to the residual, which vLLM's norms do."""

    def __init__(self, config: HyloConfig, vllm_config: VllmConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXER_CLASSES[config.mixers[layer_idx]](config, vllm_config, f"{prefix}.mixer")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, f"{prefix}.mlp")

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None, rotary: Rotary) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            residual_TD, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD, residual_TD = self.post_attention_layernorm(self.mixer(x_TD, rotary), residual_TD)
        return self.mlp(x_TD), residual_TD


class MLP(nn.Module):
    def __init__(self, config: HyloConfig, prefix: str) -> None:
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(width, config.hidden_size, bias=bias, prefix=f"{prefix}.down_proj")
        self.act = get_act_and_mul_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]
