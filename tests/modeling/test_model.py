"""The model as transformers' users meet it: registered, saved, loaded, trained, inspected."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hylo.modeling import HyloConfig, HyloForCausalLM, HyloModel

ALL_FOUR = ["mla", "gated_deltanet", "attention", "mamba2"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_save_and_load(
    make_model: Callable[..., HyloForCausalLM], tmp_path: Path, tied: bool, max_shard_size: str
) -> None:
    model = make_model(ALL_FOUR, tie_word_embeddings=tied, qk_norm=True)
    model.config.extend_context(4096, 256)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or max_shard_size == "20KB"
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is HyloForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.randint(1, 61, (2, 17))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.config.mla_rope_parameters["factor"] == 16 and loaded.config.max_position_embeddings == 4096


def test_loading_in_another_type(make_model: Callable[..., HyloForCausalLM], tmp_path: Path) -> None:
    make_model(ALL_FOUR).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded(torch.randint(1, 61, (1, 70))).logits.isfinite().all()


def test_loss_and_gradients(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(ALL_FOUR, qk_norm=True).train()
    ids = torch.randint(1, 61, (2, 80))
    output = model(ids, labels=ids)
    assert output.past_key_values is None
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_gradient_checkpointing_changes_nothing(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(ALL_FOUR).train()
    ids = torch.randint(1, 61, (2, 20))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers renames it
            (new_name or model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_padding_gets_no_gradient_and_gives_none(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(ALL_FOUR)
    embeds = torch.randn(1, 10, 32, requires_grad=True)
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[:, :4] = 0
    model(inputs_embeds=embeds, attention_mask=mask).logits[:, 4:].square().sum().backward()
    assert embeds.grad is not None and embeds.grad.isfinite().all()
    assert (embeds.grad[:, :4] == 0).all() and (embeds.grad[:, 4:] != 0).any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hidden_states_and_logits_to_keep(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(ALL_FOUR)
    ids = torch.randint(1, 61, (2, 9))
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert model(ids).hidden_states is None


def test_layers_can_be_called_by_themselves(make_model: Callable[..., HyloForCausalLM]) -> None:
    """As stage 1 does: every layer on a hidden state of its own, the mixer's output read by a hook."""
    model = make_model(ALL_FOUR)
    ids = torch.randint(1, 61, (2, 9))
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    for layer, before, after in zip(model.model.layers, hidden_states[:-2], hidden_states[1:-1], strict=False):
        handle = layer.mixer.register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(layer(before, **model.model.layer_inputs(before)), after)
        handle.remove()
    assert [output.shape for output in seen] == [(2, 9, 32)] * 3


def test_a_live_model_takes_an_extended_context_at_once(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(["mla"])
    ids = torch.randint(1, 61, (1, 40))
    before = model(ids).logits
    model.config.extend_context(8192, 32)
    assert (model(ids).logits - before).abs().max() > 1e-3
    model.config.extend_context(32, 32)
    assert torch.equal(model(ids).logits, before)


def test_linear_blocks_refuse_a_4d_mask(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(["mla", "mamba2"])
    with pytest.raises(ValueError, match="padding mask"):
        model(torch.randint(1, 61, (1, 4)), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_a_released_checkpoint_has_to_be_imported(make_model: Callable[..., HyloForCausalLM], tmp_path: Path) -> None:
    """Its config.json is its base's, whose model would silently run without most of the weights."""
    make_model(["mla"]).save_pretrained(tmp_path)
    (tmp_path / "hybrid_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"released checkpoint; run: hylo import {tmp_path} OUT"):
        HyloForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_one_graph_without_padding(make_model: Callable[..., HyloForCausalLM]) -> None:
    model, ids = make_model(ALL_FOUR), torch.randint(1, 61, (2, 70))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments", [{}, {"attention_mask": torch.ones(2, 70).tril(60)}, {"seq_idx": torch.ones(2, 70).tril(20)}]
)
def test_bfloat16(make_model: Callable[..., HyloForCausalLM], arguments: dict[str, torch.Tensor]) -> None:
    model, ids = make_model(ALL_FOUR, initializer_range=0.05), torch.randint(1, 61, (2, 70))
    expected = model(ids, **arguments).logits
    logits = model.bfloat16()(ids, **arguments).logits
    real = arguments.get("attention_mask", torch.ones(2, 70)).bool()
    torch.testing.assert_close(logits[real].float(), expected[real], atol=0.05, rtol=0)


def test_either_ids_or_embeddings(make_model: Callable[..., HyloForCausalLM]) -> None:
    with pytest.raises(ValueError, match="either"):
        make_model(["mla"])()


def test_fresh_mixers_start_like_those_of_their_sources(make_config: Callable[..., HyloConfig]) -> None:
    model = HyloModel(make_config(["gated_deltanet", "mamba2"] * 20, initializer_range=0.02))
    for layer in model.layers:
        mixer = layer.mixer
        dt = torch.nn.functional.softplus(mixer.dt_bias)
        assert dt.min() > 0.99e-3 and dt.max() < 0.101
        assert mixer.A_log.exp().max() <= 16
        convolutions = [module for module in mixer.modules() if isinstance(module, torch.nn.Conv1d)]
        assert all(0 < conv.weight.abs().max() <= 0.5 for conv in convolutions)
        assert 0.015 < layer.mlp.up_proj.weight.std() < 0.025
        assert (layer.input_layernorm.weight == 1).all()
