"""The memory estimate: fake tensors count what real ones take, and every setting moves the part that it should."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from hylo.distill.settings import Training
from hylo.estimate import Memory, flops, layer_flops, stage_flops, stage_memory
from hylo.live_bytes import LiveBytes, Moment, fake_tensors, largest, trace_decoder, traced_tokens
from hylo.modeling import HyloConfig, HyloForCausalLM

WIDTH, VOCABULARY = 64, 4096


def student(*mixers: str, **others: Any) -> HyloConfig:
    mixers = mixers or ("mla", "gated_deltanet", "mamba2", "attention")
    return HyloConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=len(mixers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mixers=list(mixers),
        kv_lora_rank=16,
        q_lora_rank=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        gdn_num_heads=2,
        gdn_head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_d_state=16,
        mamba_d_inner=64,
        mamba_d_xb=32,
        kda_num_heads=4,
        kda_head_dim=16,
        **others,
    )


def base(layers: int = 4, kind: type[PreTrainedConfig] = LlamaConfig) -> PreTrainedConfig:
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
    )


def training(**settings: Any) -> Training:
    return Training(**({"tokens": 10**6, "length": 512, "rows": 2, "learning_rate": 1e-3} | settings))


def estimate(config: HyloConfig | None = None, devices: int = 1, **settings: Any) -> Memory:
    return stage_memory(training(**settings), config or student(), base(), devices=devices)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_come_and_go_as_real_ones_do(bf16: bool, checkpointing: bool) -> None:
    def trace() -> Any:
        model = HyloForCausalLM(student()).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return trace_decoder(model, bf16)

    real = trace()
    with fake_tensors():
        fake = trace()
    assert fake.tokens == real.tokens
    assert fake.kept == real.kept
    # What an operation makes on the way is not seen of the real ones that are one operation.
    for ours, theirs in ((fake.forward, real.forward), (fake.backward, real.backward)):
        assert sum(largest(ours, 1)) == pytest.approx(sum(largest(theirs, 1)), rel=0.02)


def test_what_is_kept_is_what_autograd_saves() -> None:
    """Against torch's own account of saved tensors, for a block that we can see through."""
    block = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32))
    tokens, prime = traced_tokens(block)
    x, saved = torch.randn(tokens, 32), dict[int, int]()
    live = LiveBytes(block, prime)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for parameter in block.parameters():
        saved[parameter.untyped_storage().data_ptr()] = 0
    with live, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
        kept = live.now
    for parameter in block.parameters():
        saved.pop(parameter.untyped_storage().data_ptr())
    saved.pop(x.untyped_storage().data_ptr())
    assert kept == Moment(0, 0, sum(saved.values()) + y.untyped_storage().nbytes())


def test_gradients_are_those_of_what_trains() -> None:
    with fake_tensors():
        model = HyloForCausalLM(student())
        model.lm_head.requires_grad_(False)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trace = trace_decoder(model, bf16=False)
    last = max(moment.gradients + moment.fixed for moment in trace.backward)  # the embedding's arrives at the end
    assert last == pytest.approx(4 * trained, rel=0.001)


def test_weights_and_optimiser_are_exact() -> None:
    with fake_tensors():
        count = parameters(HyloForCausalLM(student()))
    memory = estimate()
    assert (memory.weights, memory.optimiser) == (4 * count, 8 * count)
    frozen = estimate(trains="all_but_head")
    assert frozen.optimiser == 8 * (count - VOCABULARY * WIDTH)
    mixers = estimate(trains="mixers")
    assert mixers.optimiser < 8 * (count - 2 * VOCABULARY * WIDTH)


def test_a_teacher_counts_only_where_one_runs() -> None:
    live, without = estimate(), estimate(objective="cross_entropy")
    with fake_tensors():
        weights = 4 * parameters(AutoModelForCausalLM.from_config(base()))
    assert live.teacher >= weights and without.teacher == 0
    assert estimate(teacher="cache", trains="all_but_head").teacher == 0


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    short, long = estimate(length=4096), estimate(length=8192)
    assert long.activations == pytest.approx(2 * short.activations, rel=0.02)
    assert estimate(length=8192, gradient_checkpointing=True).activations < 0.6 * long.activations
    assert estimate(length=8192, precision="bf16").activations < 0.9 * long.activations


def test_accumulating_keeps_gradients_and_needs_fewer_activations() -> None:
    whole, parts = estimate(rows=8, length=4096), estimate(rows=8, length=4096, micro_rows=2)
    assert parts.activations < 0.3 * whole.activations
    assert parts.total < whole.total
    assert parts.gradients * 2 == parts.optimiser


def test_packed_rows_give_a_teacher_a_mask() -> None:
    length = 65536
    settings = training(length=length, rows=1, gradient_checkpointing=True)
    apart, together = (stage_memory(settings, student(), base(), packed=packed) for packed in (True, False))
    assert (apart.moment, together.moment) == ("teacher", "backward")
    assert apart.teacher > 5 * length**2


def test_devices_share_weights_and_rows() -> None:
    one, four = estimate(rows=4, length=4096), estimate(devices=4, rows=4, length=4096)
    assert four.optimiser == one.optimiser / 4
    assert one.weights / 4 < four.weights < one.weights
    assert four.activations == pytest.approx(one.activations / 4, rel=0.05)


def test_layers_at_once_holds_one_layers_training_state() -> None:
    config, gdn = student(*["gated_deltanet"] * 4), student("gated_deltanet")
    with fake_tensors():
        layer = parameters(HyloForCausalLM(gdn).model.layers[0])
    together, alone = (estimate(config, objective="layers", layers_at_once=n) for n in (None, 1))
    assert (alone.weights, alone.optimiser) == (4 * layer, 8 * layer)
    assert (together.weights, together.optimiser) == (4 * 4 * layer, 4 * 8 * layer)
    assert alone.total < together.total


def test_layers_of_the_base_are_not_aligned() -> None:
    kept = estimate(student("attention", "gated_deltanet"), objective="layers")
    assert kept.weights == estimate(student("gated_deltanet", "gated_deltanet"), objective="layers").weights / 2


def test_preferences_take_two_answers_and_the_model_as_it_was() -> None:
    dpo, plain = estimate(objective="dpo", length=4096), estimate(objective="cross_entropy", length=4096)
    assert dpo.activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert dpo.teacher == plain.weights
    assert dpo.loss > 2 * 2 * 4096 * VOCABULARY * 4  # whole logits, which our own losses never make
    assert plain.loss < 2 * 2 * 4096 * VOCABULARY * 4


def test_a_mixture_holds_the_gradients_of_each() -> None:
    mixed = estimate(student(*["attention"] * 4), objective={"forward_kl": 0.5, "cross_entropy": 0.5})
    assert mixed.loss - estimate(student(*["attention"] * 4)).loss == 4 * (VOCABULARY * WIDTH + 2 * 512 * WIDTH)


@pytest.mark.parametrize("config", [base(), base(kind=Qwen3Config)], ids=["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(config: PreTrainedConfig) -> None:
    T, model = 64, AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=torch.zeros(1, T, dtype=torch.long), use_cache=False)
    every_pair = config.num_hidden_layers * 4 * config.num_attention_heads * config.head_dim * T * T
    causal = every_pair * (T + 1) / (2 * T)  # torch does not know that half of the pairs are masked
    assert T * flops(config, T) == counter.get_total_flops() - every_pair + causal


def test_linear_blocks_cost_the_same_at_any_length_and_attention_does_not() -> None:
    short, long = (layer_flops(student(), length) for length in (1024, 8192))
    assert short[1:3] == long[1:3]
    assert all(long[i] - short[i] == 2 * 4 * 2 * 16 * (8192 - 1024) / 2 for i in (0, 3))


def test_flops_of_a_stage() -> None:
    config, teacher = student(), base()
    own, theirs = flops(config, 512), flops(teacher, 512)
    assert stage_flops(training(), config, teacher) == 3 * own + theirs
    assert stage_flops(training(objective="cross_entropy"), config, teacher) == 3 * own
    ours, base_layers = layer_flops(config, 512), layer_flops(teacher, 512)  # the last layer is the base's own
    assert stage_flops(training(objective="layers"), config, teacher) == 3 * sum(ours[:3]) + sum(base_layers[:3])
    assert stage_flops(training(objective="layers"), config, teacher, [1]) == 3 * ours[1] + sum(base_layers[:2])
