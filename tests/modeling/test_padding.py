"""Padding, wherever it stands, is as if it were not there: in the logits, the gradients, the cache, the next token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hylo.modeling import HyloForCausalLM
from hylo.modeling.cache import read_states

QWEN = {"qk_norm": True, "base_model_type": "qwen3"}
MODELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "attention": (["attention"] * 2, {}),
    "mla": (["mla"] * 2, {}),
    "mla-qwen3": (["mla"] * 2, QWEN),
    "gated_deltanet": (["gated_deltanet"] * 2, {}),
    "mamba2": (["mamba2"] * 2, {}),
    "kda": (["kda", "mla"], {"qkv_bias": True}),
    "linear-mixture": (["gated_deltanet", "mamba2"], {}),
    "all-four": (["mamba2", "attention", "gated_deltanet", "mla"], {"qkv_bias": True}),
}
# Rows of calls: how many tokens, and at which of them there are real ones.
CALLS = {
    "right": [["xxxxxxxxxxx", "xxxxx......", "xxx........"], ["x", "x", "x"], ["x", "x", "x"]],
    "left": [["xxxxxxxxxxx", "......xxxxx", "..........x"], ["x", "x", "x"], ["x", "x", "x"]],
    "both": [["xxxxxxx", ".xxxx..", ".....x."], ["x", ".", "x"], ["x", "x", "."], ["x", "x", "x"]],
    "chunks": [
        ["xxxx", "x...", "...x"],
        ["xx.", ".xx", "..."],
        ["...", "...", "..."],
        ["xx..", "..xx", "x..x"],
        ["xxx"] * 3,
    ],
    "late": [["....", "....", "xxxx"], ["xxxx", "....", "...."], ["x", "x", "x"]],
    "long": [["x" * 90, "x" * 66 + "." * 24, "." * 20 + "x" * 67 + "..."], ["x", "x", "x"]],
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., HyloForCausalLM]) -> HyloForCausalLM:
    mixers, changes = MODELS[request.param]
    return make_model(mixers, **changes).double()


def masks(name: str) -> list[Tensor]:
    return [torch.tensor([[place == "x" for place in row] for row in call]).long() for call in CALLS[name]]


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("with_positions", [False, True])
def test_padded_calls_are_the_unpadded_rows(model: HyloForCausalLM, name: str, with_positions: bool) -> None:
    """Also the tokens decoded after padding. With and without position_ids such as generate makes from the mask."""
    calls = masks(name)
    mask = torch.cat(calls, dim=1)
    ids, cache, logits, past = torch.randint(1, 61, mask.shape), None, [], 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for call in calls:
        end = past + call.shape[1]
        here = positions[:, past:end] if with_positions else None
        output = model(ids[:, past:end], mask[:, :end], here, past_key_values=cache, use_cache=True)
        cache, past = output.past_key_values, end
        logits.append(output.logits)
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None], use_cache=True)
        torch.testing.assert_close(torch.cat(logits, dim=1)[row, real], alone.logits[0])
        for layer, kind in enumerate(model.config.layer_types):
            if kind == "linear_attention":
                states = zip(read_states(cache, layer), read_states(alone.past_key_values, layer), strict=True)
                for actual, expected in states:
                    torch.testing.assert_close(actual[row], expected[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(model: HyloForCausalLM, side: str) -> None:
    mask = masks(side)[0].bool()
    embeds = torch.randn(*mask.shape, 32, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*mask.shape, 61, dtype=torch.float64)
    leaves = [embeds, *(p for n, p in model.named_parameters() if n != "model.embed_tokens.weight")]
    padded = (model(inputs_embeds=embeds, attention_mask=mask.long()).logits * weights)[mask].sum()
    rows = [
        (model(inputs_embeds=embeds[row, real][None]).logits * weights[row, real]).sum()
        for row, real in enumerate(mask)
    ]
    gradients = [torch.autograd.grad(loss, leaves) for loss in (padded, torch.stack(rows).sum())]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_linear_blocks_do_not_compute_padding(make_model: Callable[..., HyloForCausalLM]) -> None:
    model, seen = make_model(["gated_deltanet", "mamba2"]), []
    for layer, name in zip(model.model.layers, ("o_proj", "out_proj"), strict=True):
        layer.mixer.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(torch.randint(1, 61, (3, 11)), attention_mask=masks("right")[0])
    assert seen == [(1, 19, 32)] * 2
