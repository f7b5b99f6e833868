"""However a sequence is cut into calls, and however generation runs, the logits are those of one full forward."""

from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicCache

from hylo.modeling import HyloForCausalLM
from hylo.modeling.cache import LinearCache

QWEN = {"qk_norm": True, "base_model_type": "qwen3"}
MODELS = {
    "attention": (["attention"] * 2, {}),
    "attention-qwen3": (["attention"] * 2, QWEN),
    "mla": (["mla"] * 2, {}),
    "mla-qwen3": (["mla"] * 2, QWEN),
    "gated_deltanet": (["gated_deltanet"] * 2, {}),
    "mamba2": (["mamba2"] * 2, {}),
    "kda": (["kda"] * 2, {}),
    "mla-kda": (["mla", "kda", "kda"], {}),
    "linear-mixture": (["gated_deltanet", "mamba2", "gated_deltanet"], {}),
    "mla-gdn": (["gated_deltanet", "mla", "gated_deltanet", "mla"], {}),
    "mla-mamba2-qwen3": (["mla", "mamba2", "mla"], QWEN),
    "all-four": (["mamba2", "attention", "gated_deltanet", "mla"], {}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, make_model: Callable[..., HyloForCausalLM]) -> HyloForCausalLM:
    mixers, changes = MODELS[request.param]
    return make_model(mixers, **changes)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[90, 1, 1, 1, 1], [1] * 12, [2, 1, 3, 1, 1], [40, 2, 1, 70, 1, 65]])
def test_calls_with_a_cache_agree_with_one_forward(model: HyloForCausalLM, cuts: list[int]) -> None:
    ids = torch.randint(1, 61, (2, sum(cuts)))
    cache, logits = None, []
    for part in ids.split(cuts, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), model(ids).logits)
    assert cache.get_seq_length() == sum(cuts)


@torch.no_grad()
def test_a_plain_cache_of_transformers_will_do(model: HyloForCausalLM) -> None:
    ids, cache = torch.randint(1, 61, (1, 9)), DynamicCache(config=model.config)
    logits = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 3], dim=1)]
    close(torch.cat(logits, dim=1), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[80], [4, 75, 1], [77, 1, 1, 1], [1] * 12])
def test_left_padding_changes_nothing(model: HyloForCausalLM, cuts: list[int]) -> None:
    """Also where a call sees nothing but padding."""
    total, lengths = sum(cuts), [sum(cuts), sum(cuts) - 7, 3]
    ids, mask = torch.randint(1, 61, (3, total)), torch.ones(3, total, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : total - length] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for position_ids in (None, positions):
        cache, logits, past = None, [], 0
        for part in ids.split(cuts, dim=1):
            end = past + part.shape[1]
            here = None if position_ids is None else position_ids[:, past:end]
            output = model(part, mask[:, :end], here, past_key_values=cache, use_cache=True)
            cache, past = output.past_key_values, end
            logits.append(output.logits)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, total - length :]).logits
            close(torch.cat(logits, dim=1)[row : row + 1, total - length :], alone)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(1, 61, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4], mask[2, :9] = 0, 0
    return ids * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("prefill_chunk_size", [None, 4])
def test_greedy_generation_of_a_left_padded_batch(model: HyloForCausalLM, prefill_chunk_size: int | None) -> None:
    ids, mask = prompts()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefill_chunk_size=prefill_chunk_size,
    )
    for row in range(len(ids)):
        sequence = output.sequences[row : row + 1, int((mask[row] == 0).sum()) :]
        expected = model(sequence).logits[0, -7:-1]
        close(torch.stack([step[row] for step in output.logits]), expected)
        assert expected.argmax(-1).tolist() == sequence[0, -6:].tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"do_sample": True}, {"num_beams": 3, "do_sample": False, "num_return_sequences": 2}],
    ids=["sample", "beam"],
)
def test_sampling_and_beam_search_do_not_depend_on_the_cache(model: HyloForCausalLM, options: dict[str, int]) -> None:
    ids, mask = prompts()
    sequences = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        sequences.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, use_cache=use_cache, **options))
    assert torch.equal(*sequences)


@torch.no_grad()
def test_generation_goes_on_from_its_cache(model: HyloForCausalLM) -> None:
    ids = torch.randint(1, 61, (2, 8))
    options = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    first = model.generate(ids, max_new_tokens=4, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    assert torch.equal(second.sequences, model.generate(ids, max_new_tokens=8, **options).sequences)


@torch.no_grad()
def test_generation_without_tokens_of_padding_or_a_mask(model: HyloForCausalLM) -> None:
    output = model.generate(torch.tensor([[7]]), max_new_tokens=3, do_sample=False)
    assert output.shape == (1, 4)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_mla_caches_the_latent(make_model: Callable[..., HyloForCausalLM], qk_norm: bool) -> None:
    """kv_lora_rank + qk_rope_head_dim values a token; with Qwen3's key norm, one more per kv head."""
    model = make_model(["mla"], qk_norm=qk_norm)
    layer = model(torch.randint(1, 61, (2, 9))).past_key_values.layers[0]
    assert layer.keys.shape == (2, 1, 9, 20)
    assert layer.values.shape == (2, 1, 9, 8 + 2 * qk_norm)


@torch.no_grad()
def test_linear_blocks_cache_a_few_columns_and_a_state(make_model: Callable[..., HyloForCausalLM]) -> None:
    model = make_model(["gated_deltanet", "mamba2"]).bfloat16()
    cache = model(torch.randint(1, 61, (2, 9))).past_key_values
    assert isinstance(cache, LinearCache)
    assert [layer.conv_states[0].shape for layer in cache.layers] == [(2, 96, 3), (2, 104, 3)]
    assert [layer.recurrent_states[0].shape for layer in cache.layers] == [(2, 2, 12, 24), (2, 4, 16, 12)]
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers)
    cache.reset()
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_decoding_leaves_the_latent_unexpanded(
    make_model: Callable[..., HyloForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(["mla"])
    cache = model(torch.randint(1, 61, (1, 9))).past_key_values
    monkeypatch.setattr("hylo.modeling.mla.expanded_latent_attention", None)
    model(torch.randint(1, 61, (1, 1)), past_key_values=cache)
