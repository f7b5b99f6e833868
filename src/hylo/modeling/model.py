"""The hybrid decoder: the base's embeddings, norms and MLPs, with a token mixer of its own choice in every layer."""

import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hylo.modeling.attention import Attention, RMSNorm
from hylo.modeling.cache import LinearCache, new_cache
from hylo.modeling.configuration import CACHE_KIND, RELEASED, HyloConfig
from hylo.modeling.documents import Documents, Visible, find_documents, pack
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention
from hylo.modeling.mamba2 import GroupedRMSNorm, Mamba2
from hylo.modeling.mla import MultiHeadLatentAttention
from hylo.modeling.rope import LINEAR_WIDTHS, QUERIES, Rotary, cos_sin, frequencies, query_factor

MIXER_CLASSES = {
    "attention": Attention,
    "mla": MultiHeadLatentAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
    "kda": KimiDeltaAttention,
}
LayerMasks = dict[str, Documents | Visible | None]  # by layer type


class MLP(nn.Module):
    def __init__(self, config: HyloConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HyloDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)). Call it with the keyword arguments of `HyloModel.layer_inputs`."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        mixer = config.mixers[layer_idx]
        self.layer_type = CACHE_KIND[mixer]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXER_CLASSES[mixer](config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: LayerMasks | None = None,
        rotary: Rotary | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        mask = attention_mask[self.layer_type] if attention_mask is not None else None
        hidden_states = hidden_states + self.mixer(self.input_layernorm(hidden_states), mask, rotary, past_key_values)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HyloPreTrainedModel(PreTrainedModel):
    config_class = HyloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyloDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _is_stateful = True  # a recurrent state cannot be rolled back: no assisted decoding
    _can_record_outputs = {"hidden_states": HyloDecoderLayer}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """transformers' own. Raises ValueError for a released checkpoint, whose config.json is its base's."""
        directory = pretrained_model_name_or_path
        if directory is not None and (Path(directory) / RELEASED).is_file():
            raise ValueError(f"{directory} is a released checkpoint; run: hylo import {directory} OUT, and load OUT")
        return super().from_pretrained(directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fresh parameters. Gates and convolutions start as in flash-linear-attention and mamba-ssm."""
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm | GroupedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, GatedDeltaNet | Mamba2 | KimiDeltaAttention):
            # A uniform up to 16; dt log-uniform in [0.001, 0.1], through the inverse of softplus
            A = torch.empty_like(module.A_log).uniform_(1e-3 if isinstance(module, GatedDeltaNet) else 1.0, 16)
            init.copy_(module.A_log, A.log())
            dt = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
            init.copy_(module.dt_bias, inverse_softplus(dt))
            if isinstance(module, Mamba2):
                init.ones_(module.D)


class HyloModel(HyloPreTrainedModel):
    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HyloDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """attention_mask: (B, past + T), zero on padding. Caches by default unless training or packed.

        Rows may pack documents, which cu_seq_lens_q, seq_idx or position_ids that restart tell apart (`find_documents`,
        what transformers' DataCollatorWithFlattening passes). Raises ValueError if such rows are to be cached.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch = (hidden_states.shape[0], hidden_states.shape[1])
        documents = find_documents(batch, attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        packed = documents is not None and documents.packed
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        if packed and (use_cache or past_key_values is not None):
            raise ValueError("a packed row cannot be cached, as it has no one end to go on from: set use_cache=False")
        if use_cache and past_key_values is None:
            past_key_values = new_cache(self.config)
        inputs = self._layer_inputs(hidden_states, attention_mask, position_ids, past_key_values, documents)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **inputs)
        if isinstance(past_key_values, LinearCache):
            past_key_values.seen_tokens += hidden_states.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def layer_inputs(
        self,
        hidden_states_BTD: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> dict[str, Any]:
        """What a decoder layer takes beside its hidden state, by keyword: masks by layer type, cos and sin, the cache.

        The arguments are those of `forward`. Raises ValueError for a 4-D mask where there are linear blocks, which
        cannot follow it.
        """
        batch = (hidden_states_BTD.shape[0], hidden_states_BTD.shape[1])
        documents = find_documents(batch, attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        return self._layer_inputs(hidden_states_BTD, attention_mask, position_ids, past_key_values, documents)

    def _layer_inputs(
        self,
        hidden_states_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        documents: Documents | None,
    ) -> dict[str, Any]:
        masks: LayerMasks = {}
        packed = documents is not None and (documents.packed or past_key_values is None)
        if "linear_attention" in self.config.layer_types:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError("linear blocks take a padding mask (batch, tokens); a 4-D mask cannot be followed")
            masks["linear_attention"] = documents
        if "full_attention" in self.config.layer_types:
            if packed:
                masks["full_attention"] = Visible(documents=documents)
            else:
                masks["full_attention"] = self._visible(hidden_states_BTD, attention_mask, past_key_values)
        rotary: Rotary = {}
        if self.has_positions:
            if position_ids is None and packed:
                assert documents is not None
                real = position_ids = documents.positions().to(hidden_states_BTD.device)
            else:
                if position_ids is None:
                    position_ids = _positions(hidden_states_BTD, attention_mask, past_key_values)
                real = position_ids
                if documents is not None:
                    real = pack(position_ids.expand(documents.shape)[..., None], documents)[..., 0]
            # Attention keeps the rows of a padded batch that is cached; linear blocks always see the real tokens alone.
            rotary = self.rope(hidden_states_BTD, real if packed else position_ids, real)
        return {"attention_mask": masks, "rotary": rotary, "past_key_values": past_key_values}

    def _visible(
        self, hidden_states_BTD: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
    ) -> Visible:
        """Causality and padding are told as such, so that nobody makes a mask of queries by tokens. Caches with room
        for tokens to come, and masks that are given with four dimensions, go through transformers' own."""
        T, roomy = hidden_states_BTD.shape[1], past_key_values is not None and past_key_values.is_compileable
        if not roomy:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            if attention_mask is None or attention_mask.shape[1:] == (past + T,):
                if attention_mask is None or attention_mask.all():
                    return Visible()
                return Visible(padding_BS=attention_mask.bool())
        # Without position_ids, in which transformers would look for packed documents again.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states_BTD,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        first = roomy and mask is None and T > 1  # or there would be a mask, to hide the room
        return Visible(mask=mask, filled=T if first else None)

    @property
    def has_positions(self) -> bool:
        """Whether any layer asks where its tokens stand."""
        return bool(frequencies(self.config)) or self.config.positions == "hype"

    def rope(self, hidden_states: Tensor, position_ids_BT: Tensor, linear_BT: Tensor | None = None) -> Rotary:
        """cos and sin (B,T,width) of all that rotates (`rotary_key`), and HyPE's factor where this is no training.

        linear_BT: positions of the tokens that linear blocks see, where these are others.
        """
        linear_BT = position_ids_BT if linear_BT is None else linear_BT
        rotary: Rotary = {
            kind: cos_sin(*turns, linear_BT if kind in LINEAR_WIDTHS else position_ids_BT, hidden_states.dtype)
            for kind, turns in frequencies(self.config).items()
        }
        if self.config.positions == "hype" and not self.training:
            rotary[QUERIES] = (query_factor(self.config, position_ids_BT),)
        return rotary


class HyloForCausalLM(HyloPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.model = HyloModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """labels (B,T): input_ids, -100 for no loss; shifted inside. logits_to_keep: last n positions, 0 for all."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """transformers' own, but for models without attention layers, whose tokens its cache cannot count."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if cache is not given and type(cache) is DynamicCache and "full_attention" not in self.config.layer_types:
            model_kwargs["past_key_values"] = new_cache(self.config)


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _positions(hidden_states_BTD: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
    """(B or 1, T): each token's place among the row's tokens, padding not counted."""
    length = hidden_states_BTD.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(past, past + length, device=hidden_states_BTD.device)[None]
