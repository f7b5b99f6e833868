"""Where tokens stand, under `positions` none and hype: the mixers against written-out forms, in calls of every kind."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.attention import Attention
from hylo.modeling.mla import MultiHeadLatentAttention
from hylo.modeling.rope import frequencies, query_factor

MakeModel = Callable[..., HyloForCausalLM]
A = 7  # hype_scale, small enough that the factor shows
KDA = {"kda_num_heads": 2, "kda_head_dim": 8}
ALL = ["mla", "gated_deltanet", "attention", "mamba2", "kda"]
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "none": (["mla", "gated_deltanet", "attention"], {"positions": "none"}),
    "none, all mla": (["mla", "mla"], {"positions": "none"}),
    "hype": (ALL, {"positions": "hype", "hype_scale": A}),
    "hype, qwen3": (ALL, {"positions": "hype", "hype_scale": A, "qk_norm": True, "base_model_type": "qwen3"}),
    "hype, biases, gated": (ALL, {"positions": "hype", "hype_scale": A, "qkv_bias": True, "attention_gate": True}),
    "hype, all linear": (["gated_deltanet", "mamba2", "kda"], {"positions": "hype", "hype_scale": A}),
    "hype, all mla": (["mla", "mla"], {"positions": "hype", "hype_scale": A}),
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, make_model: MakeModel) -> HyloForCausalLM:
    mixers, changes = CASES[request.param]
    return make_model(mixers, **KDA, **changes)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def attended(q_THd: Tensor, k_SHd: Tensor, v_SHd: Tensor, a: int | None) -> Tensor:
    """Query by query, head by head; with `a`, the logits of the query at t times log(t + a) / log(a). (T,H,d)."""
    out = torch.zeros(*q_THd.shape[:2], v_SHd.shape[2], dtype=q_THd.dtype)
    for t in range(len(q_THd)):
        factor = 1.0 if a is None else math.log(t + a) / math.log(a)
        for h in range(q_THd.shape[1]):
            logits = torch.stack([q_THd[t, h] @ k_SHd[s, h] for s in range(t + 1)])
            weights = (logits * factor / math.sqrt(q_THd.shape[2])).softmax(0)
            out[t, h] = weights @ v_SHd[: t + 1, h]
    return out


def heads_of(mixer: Attention | MultiHeadLatentAttention, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (T,H,d), nothing rotated."""
    if isinstance(mixer, Attention):
        q, k, v = (p(x_TD).unflatten(-1, (-1, 16)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    q = mixer.q_b_proj(mixer.q_a_proj(x_TD)).unflatten(-1, (-1, 16))
    latent, shared = mixer.kv_a_proj_with_mqa(x_TD).split([mixer.rank, 8], dim=-1)
    up = (latent @ mixer.kv_b_proj.weight.T).unflatten(-1, (2, -1))
    k = torch.cat((up[..., :8], shared[:, None].expand(-1, 2, -1)), dim=-1)
    return q, k.repeat_interleave(2, 1), up[..., 8:].repeat_interleave(2, 1)


@pytest.mark.parametrize("positions", ["none", "hype"])
@pytest.mark.parametrize("mixer", ["attention", "mla"])
def test_attention_written_out(make_model: MakeModel, mixer: str, positions: str) -> None:
    model = make_model([mixer], positions=positions, hype_scale=A).double()
    layer, x = model.model.layers[0].mixer, torch.randn(1, 11, 32, dtype=torch.float64)
    for training in (False, True):
        rotary = model.train(training).model.layer_inputs(x)["rotary"]
        with torch.no_grad():
            expected = attended(*heads_of(layer, x[0]), a=A if positions == "hype" and not training else None)
            torch.testing.assert_close(
                layer(x, None, rotary)[0], layer.o_proj(expected.flatten(1)), atol=2e-6, rtol=0
            )  # the factor is a float32 number


def test_query_factor() -> None:
    """Counted from 0, where it is 1; after as many tokens again as were trained at it is log(2a) / log(a)."""
    config = HyloConfig(positions="hype", max_position_embeddings=2048)
    factor = query_factor(config, torch.tensor([[0, 2048]]))
    torch.testing.assert_close(factor, torch.tensor([[1.0, 12 / 11]]))
    config.hype_scale = 2
    assert query_factor(config, torch.tensor([[6]])).item() == pytest.approx(3)


@pytest.mark.parametrize("positions", ["rope", "none", "hype"])
@pytest.mark.parametrize(
    ("mixer", "module", "op", "rotated"),
    [
        ("gated_deltanet", "gated_deltanet", "gated_delta_rule", (0, 1)),
        ("kda", "kda", "kimi_delta_rule", (0, 1)),
        ("mamba2", "mamba2", "ssd", (3, 4)),
    ],
)
def test_linear_blocks_rotate_queries_and_keys(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    positions: str,
    mixer: str,
    module: str,
    op: str,
    rotated: tuple[int, int],
) -> None:
    """What reaches the recurrence: pair (j, j + d/2) of token t turned by t theta^(-2j/d), all else as it was."""
    theta = 300.0
    rope = {"rope_type": "default", "rope_theta": theta}
    model = make_model([mixer], positions=positions, rope_parameters=rope, **KDA).double()
    x, seen = torch.randn(2, 9, 32, dtype=torch.float64), []
    place = f"hylo.modeling.{module}.{op}"
    original = getattr(__import__(f"hylo.modeling.{module}", fromlist=[op]), op)

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, recording)
    layer = model.model.layers[0].mixer
    with torch.no_grad():
        layer(x, None, model.model.layer_inputs(x)["rotary"])
        layer.rotary_key = None
        layer(x, None, {})
    given, plain = seen
    for i, (ours, before) in enumerate(zip(given, plain, strict=True)):
        if i not in rotated or positions != "hype":
            assert ours is before or torch.equal(ours, before)
            continue
        d = before.shape[-1]
        pairs = torch.complex(*before.chunk(2, dim=-1))
        angles = torch.arange(9.0)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
        turned = pairs * torch.exp(1j * angles.double())[None, :, None]
        torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=0)


def test_nothing_rotates_in_attention(make_model: MakeModel) -> None:
    assert frequencies(make_model(["mla", "attention", "mamba2"], positions="none").config) == {}
    hype = make_model(ALL, positions="hype", **KDA).config
    assert sorted(frequencies(hype)) == ["gated_deltanet", "kda", "mamba2"]
    ids = torch.randint(1, 61, (1, 12))
    model = make_model(["mla", "attention", "mamba2"], positions="none")
    assert torch.equal(model(ids).logits, model(ids, position_ids=3 * torch.arange(12)[None]).logits)


def test_only_distances_count_in_training(make_model: MakeModel) -> None:
    """But in KDA, where the channels of a pair decay each at a pace of its own, which no rotation leaves alone."""
    model = make_model(ALL[:4], positions="hype", hype_scale=A).double().train()
    ids, places = torch.randint(1, 61, (2, 12)), torch.arange(12)[None]
    first = model(ids, position_ids=places).logits
    torch.testing.assert_close(model(ids, position_ids=places + 5).logits, first, atol=1e-4, rtol=0)
    assert (model(ids, position_ids=2 * places).logits - first).abs().max() > 1e-2
    with torch.no_grad():
        assert (model.eval()(ids, position_ids=places).logits - first).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[70, 1, 1, 1], [1] * 8, [2, 1, 3, 66]])
def test_calls_with_a_cache_agree_with_one_forward(model: HyloForCausalLM, cuts: list[int]) -> None:
    ids = torch.randint(1, 61, (2, sum(cuts)))
    cache, logits = None, []
    for part in ids.split(cuts, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, dim=1), model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[13], [2, 3, 1, 6, 1]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: HyloForCausalLM, side: str, cuts: list[int]) -> None:
    """With and without a cache, by the mask alone; of right padding, in one call."""
    if side == "right" and len(cuts) > 1:
        return
    ids, lengths = torch.randint(1, 61, (3, 13)), [13, 9, 4]
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        if side == "left":
            mask[row, : 13 - length] = 0
        else:
            mask[row, length:] = 0
    for cached in (True, False) if len(cuts) == 1 else (True,):
        cache, logits, end = None, [], 0
        for part in ids.split(cuts, dim=1):
            end += part.shape[1]
            output = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=cached)
            cache = output.past_key_values
            logits.append(output.logits)
        for row, whole in enumerate(torch.cat(logits, dim=1)):
            real = mask[row].bool()
            close(whole[real], model(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_documents_are_those_apart(model: HyloForCausalLM, told: str, training: bool) -> None:
    model.train(training)
    ids, lengths = torch.randint(1, 61, (1, 23)), [9, 1, 13]
    hints = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, 9, 10, 23]),
        "seq_idx": torch.arange(3).repeat_interleave(torch.tensor(lengths))[None],
    }
    packed = model(ids, use_cache=False, **{told: hints[told]}).logits
    close(packed, torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1))


@torch.no_grad()
def test_batched_generation_is_that_of_each_alone(model: HyloForCausalLM) -> None:
    prompts = [torch.randint(1, 61, (n,)) for n in (3, 11, 6)]
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    batch, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 11 - len(prompt) :], mask[row, 11 - len(prompt) :] = prompt, 1
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)
        assert together[row, 11:].tolist() == alone[0, len(prompt) :].tolist()


def test_saved_and_loaded(model: HyloForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(1, 61, (1, 9))
    assert loaded.config.positions == model.config.positions and loaded.config.hype_scale == model.config.hype_scale
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_context_is_extended_without_yarn() -> None:
    for positions, scale in (("none", None), ("hype", 512)):
        config = HyloConfig(positions=positions)
        config.extend_context(65536, 2048)
        config.trained_at(512)
        assert config.max_position_embeddings == 65536 and config.hype_scale == scale
        assert config.mla_rope_parameters["rope_type"] == "default"


def test_configurations_from_before_rotate_as_they_did(make_config: Callable[..., HyloConfig]) -> None:
    old = make_config(["mla", "gated_deltanet"]).to_dict()
    for key in ("positions", "hype_scale", "attention_gate"):
        del old[key]
    config = HyloConfig.from_dict(old)
    assert (config.positions, config.attention_gate) == ("rope", False)
    assert list(frequencies(config)) == ["mla"]


@pytest.mark.parametrize(("changes", "said"), [({"positions": "alibi"}, "alibi"), ({"hype_scale": 1}, "at least 2")])
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HyloConfig(**changes)
