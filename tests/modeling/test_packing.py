"""A packed row is its documents run apart, in all mixers, however the documents are told apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from hylo.modeling import HyloForCausalLM

LENGTHS = [70, 1, 5, 66, 2]
QWEN = {"qk_norm": True, "base_model_type": "qwen3"}
MODELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "attention": (["attention"] * 2, {}),
    "attention-qwen3": (["attention"] * 2, QWEN),
    "mla": (["mla"] * 2, {}),
    "mla-qwen3": (["mla"] * 2, QWEN),
    "gated_deltanet": (["gated_deltanet"] * 2, {}),
    "mamba2": (["mamba2"] * 2, {}),
    "kda": (["kda", "mla"], {"qkv_bias": True}),
    "all-four": (["mamba2", "attention", "gated_deltanet", "mla"], {"qkv_bias": True}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., HyloForCausalLM]) -> HyloForCausalLM:
    mixers, changes = MODELS[request.param]
    return make_model(mixers, **changes).double()


@pytest.fixture
def hybrid(make_model: Callable[..., HyloForCausalLM]) -> HyloForCausalLM:
    return make_model(["mamba2", "attention", "gated_deltanet", "mla"]).double()


def documents(lengths: list[int]) -> list[Tensor]:
    return [torch.randint(1, 61, (length,)) for length in lengths]


def flattened(rows: list[Tensor], hint: str) -> dict[str, Any]:
    """What transformers' collator passes, with one of its ways to tell documents apart."""
    collator = DataCollatorWithFlattening(
        return_position_ids=hint == "position_ids",
        return_flash_attn_kwargs=hint == "cu_seq_lens",
        return_seq_idx=hint == "seq_idx",
        return_tensors="pt",
    )
    return collator([{"input_ids": row} for row in rows])


@pytest.mark.parametrize("hint", ["position_ids", "cu_seq_lens", "seq_idx"])
def test_a_packed_row_is_its_documents(model: HyloForCausalLM, hint: str) -> None:
    rows = documents(LENGTHS)
    batch = flattened(rows, hint)
    labels = batch.pop("labels")
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    leaves = [embeds, *(p for n, p in model.named_parameters() if n != "model.embed_tokens.weight")]
    packed = model(inputs_embeds=embeds, labels=labels, **batch)
    assert packed.past_key_values is None
    alone = [model(inputs_embeds=part) for part in embeds.split(LENGTHS, dim=1)]
    logits = torch.cat([output.logits for output in alone], dim=1)
    torch.testing.assert_close(packed.logits, logits)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(packed.loss, expected.float())
    weights = torch.randn_like(logits)
    gradients = [torch.autograd.grad((each * weights).sum(), leaves) for each in (packed.logits, logits)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


@torch.no_grad()
@pytest.mark.parametrize("hint", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_every_row_may_be_packed_in_its_own_way(model: HyloForCausalLM, hint: str, padding: str) -> None:
    """Also with padding, which belongs to no document."""
    packings = [[4, 9, 7], [20], [1, 1, 18]] if padding == "none" else [[4, 9, 3], [20], [1, 1, 2]]
    ids, mask = torch.randint(1, 61, (3, 20)), torch.zeros(3, 20, dtype=torch.long)
    positions, index, places = torch.zeros_like(ids), torch.full_like(ids, 7), []
    for row, lengths in enumerate(packings):
        start = 20 - sum(lengths) if padding == "left" else 0
        for n, length in enumerate(lengths):
            places.append((row, slice(start, start + length)))
            mask[places[-1]], positions[places[-1]], index[places[-1]] = 1, torch.arange(length), n
            start += length
    hints = {"position_ids": positions} if hint == "position_ids" else {"seq_idx": index.int()}
    logits = model(ids, attention_mask=mask, **hints).logits
    for row, tokens in places:
        torch.testing.assert_close(logits[row, tokens][None], model(ids[row, tokens][None]).logits)


@torch.no_grad()
def test_bounds_of_a_batch_and_ends_of_rows(hybrid: HyloForCausalLM) -> None:
    ids = torch.randint(1, 61, (2, 9))
    bounds = torch.tensor([0, 4, 9, 9, 12, 18], dtype=torch.int32)
    logits = hybrid(ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=6, max_length_k=6).logits
    apart = [hybrid(part[None]).logits[0] for part in ids.flatten().split([4, 5, 3, 6])]
    torch.testing.assert_close(logits.flatten(0, 1), torch.cat(apart))
    rows_alone = torch.tensor([0, 9, 18])
    assert torch.equal(hybrid(ids, cu_seq_lens_q=rows_alone).logits, hybrid(ids).logits)
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 9, but there are 18 tokens"):
        hybrid(ids, cu_seq_lens_q=torch.tensor([0, 9]))


@torch.no_grad()
def test_gaps_in_positions_are_no_bounds(hybrid: HyloForCausalLM) -> None:
    """Only positions that do not rise are; and those of padding say nothing."""
    ids, mask = torch.randint(1, 61, (1, 7)), torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    expected = hybrid(ids[mask.bool()][None], position_ids=torch.tensor([[0, 1, 5, 6, 7]])).logits
    for positions in ([0, 1, 0, 0, 5, 6, 7], [0, 1, 9, 9, 5, 6, 7]):
        logits = hybrid(ids, attention_mask=mask, position_ids=torch.tensor([positions])).logits
        torch.testing.assert_close(logits[mask.bool()][None], expected)


@torch.no_grad()
def test_a_packed_row_is_not_cached(hybrid: HyloForCausalLM) -> None:
    ids, positions = torch.randint(1, 61, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert hybrid(ids, position_ids=positions).past_key_values is None
    cache = hybrid(ids).past_key_values
    for options in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="a packed row cannot be cached"):
            hybrid(ids, position_ids=positions, **options)
    assert cache.get_seq_length() == 6


@torch.no_grad()
def test_attention_makes_no_mask(hybrid: HyloForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of a packed row would grow with its square."""
    monkeypatch.setattr("hylo.modeling.model.create_causal_mask", None)
    hybrid(**flattened(documents([3, 4]), "cu_seq_lens"))


def test_gradient_checkpointing_of_packed_rows(hybrid: HyloForCausalLM) -> None:
    batch, gradients = flattened(documents([3, 1, 9]), "cu_seq_lens"), []
    for checkpointing in (False, True):
        if checkpointing:
            new_name = getattr(hybrid, "activation_checkpointing_enable", None)  # transformers renames it
            (new_name or hybrid.gradient_checkpointing_enable)()
        hybrid.train().zero_grad()
        hybrid(**batch).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in hybrid.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@torch.no_grad()
def test_layers_can_be_called_by_themselves_on_packed_rows(hybrid: HyloForCausalLM) -> None:
    rows = documents([3, 1, 9])
    ids, bounds = torch.cat(rows)[None], torch.tensor([0, 3, 4, 13])
    hidden_states = hybrid(ids, cu_seq_lens_q=bounds, output_hidden_states=True).hidden_states
    inputs = hybrid.model.layer_inputs(hidden_states[0], cu_seq_lens_q=bounds)
    for layer, before, after in zip(hybrid.model.layers[:3], hidden_states[:3], hidden_states[1:4], strict=True):
        torch.testing.assert_close(layer(before, **inputs), after)
