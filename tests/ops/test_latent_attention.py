"""Attention in all its forms against softmax written out, in float64: values, gradients, edges of chunks, memory."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from largest import Largest
from torch import Tensor

from hylo.ops import absorbed_latent_attention, expanded_latent_attention
from hylo.ops.latent_attention import attend, naive_attend

KV_HEADS, NOPE, ROPE, V, RANK = 2, 6, 4, 5, 7
OPS = sys.modules["hylo.ops.latent_attention"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(queries: int, tokens: int) -> list[Tensor]:
    """q for 6 heads, the latent, the shared rotated key, the up-projection and its bias."""
    shapes: list[tuple[int, ...]] = [(2, 6, queries, NOPE + ROPE), (2, tokens, RANK), (2, tokens, ROPE)]
    shapes += [(KV_HEADS * (NOPE + V), RANK), (KV_HEADS * (NOPE + V),)]
    return [random(*shape) for shape in shapes]


def visible_tokens(kind: str, queries: int, tokens: int) -> tuple[dict[str, Any], Tensor]:
    """How each way to say what queries see is passed, and what they see, (B,1,T,S); every query sees one at least."""
    causal = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None].repeat(2, 1, 1, 1)
    free = torch.rand(2, 1, queries, tokens) > 0.4
    free[..., 0] = True
    padding = torch.rand(2, tokens) > 0.4
    padding[:, 0] = True
    match kind:
        case "causal":
            return {"mask": None}, causal
        case "padding":
            return {"mask": None, "padding_BS": padding}, causal & padding[:, None, None]
        case "boolean":
            return {"mask": free}, free
        case "boolean, one row":
            return {"mask": free[:1, :, :1]}, free[:1, :, :1].expand_as(free)
        case "boolean of two dimensions":
            return {"mask": free[0, 0]}, free[:1].expand_as(free)
        case "boolean and padding":
            return {"mask": free, "padding_BS": padding}, free & padding[:, None, None]
        case "additive":
            return {"mask": torch.zeros(free.shape).double().masked_fill(~free, -1e9)}, free
        case "additive and padding":
            mask = torch.zeros(free.shape).double().masked_fill(~free, -1e9)
            return {"mask": mask, "padding_BS": padding}, free & padding[:, None, None]
    raise AssertionError(kind)


KINDS = ["causal", "padding", "boolean", "boolean, one row", "boolean of two dimensions", "boolean and padding"]
KINDS += ["additive", "additive and padding"]


def same(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((o * weights).sum(), leaves, retain_graph=True) for o in (actual, expected)]
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.fixture(params=[1 << 26, 9 * 2 * 9 * 4, 1], ids=["one chunk", "chunks of four or eight", "query by query"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS, "MASK_BYTES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "tokens"), [(9, 9), (4, 9), (5, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("widths", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend(kind: str, queries: int, tokens: int, widths: tuple[int, int], kv_heads: int) -> None:
    q, k = random(2, 6, queries, widths[0]), random(2, kv_heads, tokens, widths[0])
    v = random(2, kv_heads, tokens, widths[1])
    arguments, visible = visible_tokens(kind, queries, tokens)
    o = attend(q, k, v, arguments.pop("mask"), 0.3, **arguments)
    same(o, naive_attend(q, k, v, 0.3, visible), [q, k, v])
    if kind == "causal":
        same(o, naive_attend(q, k, v, 0.3), [q, k, v])


@pytest.mark.parametrize("widths", [(8, 8), (8, 5)])
@pytest.mark.parametrize("lengths", [[9], [4, 1, 4], [0, 3, 0, 6, 0], [1] * 9])
def test_documents_see_themselves(widths: tuple[int, int], lengths: list[int]) -> None:
    q, k, v = random(1, 6, 9, widths[0]), random(1, 2, 9, widths[0]), random(1, 2, 9, widths[1])
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    visible = (document[:, None] == document) & torch.ones(9, 9, dtype=torch.bool).tril()
    same(attend(q, k, v, None, 0.3, lengths), naive_attend(q, k, v, 0.3, visible), [q, k, v])


def test_nothing_but_padding_is_a_row_without_tokens() -> None:
    q, k, v = torch.randn(1, 6, 0, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 5)
    assert attend(q, k, v, None, 0.3, [0, 0]).shape == (1, 6, 0, 5)
    assert attend(q, k, v, None, 0.3).shape == (1, 6, 0, 5)


def expanded_by_hand(tensors: list[Tensor], key_scale: Tensor | None, visible: Tensor | None) -> Tensor:
    q, latent, key_rope, up_weight, up_bias = tensors
    keys, values = [], []
    for head in range(KV_HEADS):
        rows, bias = up_weight.view(KV_HEADS, -1, RANK)[head], up_bias.view(KV_HEADS, -1)[head]
        key = torch.cat((latent @ rows[:NOPE].T + bias[:NOPE], key_rope), dim=-1)
        keys.append(key if key_scale is None else key * key_scale[:, head, :, None])
        values.append(latent @ rows[NOPE:].T + bias[NOPE:])
    return naive_attend(q, torch.stack(keys, 1), torch.stack(values, 1), 0.3, visible)


@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_expanded_and_absorbed_head_by_head(queries: int, with_scale: bool, kind: str) -> None:
    inputs = operands(queries, 9)
    key_scale = torch.rand(2, KV_HEADS, 9, dtype=torch.float64, requires_grad=True) if with_scale else None
    leaves = inputs + ([] if key_scale is None else [key_scale])
    arguments, visible = visible_tokens(kind, queries, 9)
    expected = expanded_by_hand(inputs, key_scale, visible)
    same(expanded_latent_attention(*inputs, KV_HEADS, 0.3, key_scale_BKS=key_scale, **arguments), expected, leaves)
    if kind in ("causal", "padding"):  # absorbed, every query sees every token, or every real one
        every = (
            torch.ones_like(visible) & arguments.get("padding_BS", torch.ones(2, 9, dtype=torch.bool))[:, None, None]
        )
        expected = expanded_by_hand(inputs, key_scale, every)
    same(absorbed_latent_attention(*inputs, KV_HEADS, 0.3, key_scale_BKS=key_scale, **arguments), expected, leaves)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("kind", ["causal", "padding"])
def test_gradients_by_differences(with_scale: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPS, "MASK_BYTES", 1)
    inputs = operands(2, 3)
    inputs += [torch.rand(2, KV_HEADS, 3, dtype=torch.float64, requires_grad=True)] if with_scale else []
    arguments, _ = visible_tokens(kind, 2, 3)
    for function in (expanded_latent_attention, absorbed_latent_attention):

        def run(*tensors: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*tensors[:5], KV_HEADS, 0.3, key_scale_BKS=tensors[5] if with_scale else None, **arguments)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("function", [expanded_latent_attention, absorbed_latent_attention])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_query_that_sees_nothing_is_finite(function: Callable[..., Tensor], queries: int) -> None:
    hidden = torch.zeros(2, 1, queries, 9, dtype=torch.bool)
    for arguments in ({"mask": hidden}, {"padding_BS": hidden[:, 0, 0]}):
        inputs = operands(queries, 9)
        o = function(*inputs, KV_HEADS, 0.3, **arguments)
        assert o.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(o.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_scale", [False, True])
def test_absorbed_is_as_exact_as_expanded(dtype: torch.dtype, with_scale: bool) -> None:
    """Against float64 of the same numbers."""
    inputs = [tensor.detach().to(dtype) for tensor in operands(1, 300)]
    inputs[0] *= 3  # attention that is sharp
    key_scale = torch.rand(2, KV_HEADS, 300).to(dtype) if with_scale else None
    exact = expanded_by_hand([t.double() for t in inputs], None if key_scale is None else key_scale.double(), None)
    errors = []
    for function in (absorbed_latent_attention, expanded_latent_attention):
        o = function(*inputs, KV_HEADS, 0.3, key_scale_BKS=key_scale)
        assert o.dtype == dtype
        errors.append(float((o - exact).norm() / exact.norm()))
    assert errors[0] < 1.5 * errors[1] and errors[1] < (1e-6 if dtype == torch.float32 else 0.02)


def cases() -> Iterator[tuple[str, int, bool]]:
    for kind in ("causal", "padding", "past"):
        for value_width in (16, 8):
            for training in (False, True):
                yield kind, value_width, training


@pytest.mark.parametrize(("kind", "value_width", "training"), list(cases()))
def test_no_matrix_of_queries_by_tokens(kind: str, value_width: int, training: bool) -> None:
    T = 5120
    past = 1024 if kind == "past" else 0
    q = torch.randn(1, 2, T - past, 16, requires_grad=training)
    k, v = (torch.randn(1, 1, T, width, requires_grad=training) for width in (16, value_width))
    padding = torch.arange(T)[None] >= 7 if kind == "padding" else None
    with Largest() as largest:
        o = attend(q, k, v, None, 0.3, padding_BS=padding)
        if training:
            o[:, :, 7:].sum().backward()
    assert 0 < largest.numel < T * T * 3 // 4
    expected = naive_attend(
        *(t.detach()[:, :, -40:] for t in (q,)), k.detach(), v.detach(), 0.3, _last_rows(T, padding)
    )
    torch.testing.assert_close(o[:, :, -40:].detach(), expected, atol=1e-5, rtol=1e-4)


def _last_rows(T: int, padding: Tensor | None) -> Tensor:
    causal = torch.ones(40, T, dtype=torch.bool).tril(T - 40)
    return causal if padding is None else causal & padding[:, None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 6, 3)}, r"q has shape (2, 6, 3), expected (B, H, T, D)"),
        ({"latent": torch.randn(3, 9, 7)}, r"latent has shape (3, 9, 7), expected (B=2, S, R)"),
        ({"key_rope": torch.randn(2, 8, 4)}, r"key_rope has shape (2, 8, 4), expected (B=2, S=9, P)"),
        ({"key_rope": torch.randn(2, 9, 11)}, r"key_rope is 11 wide, expected at most D=10"),
        ({"up_weight": torch.randn(22, 6)}, r"up_weight has shape (22, 6), expected (E=22, R=7)"),
        ({"up_weight": torch.randn(12, 7)}, r"up_weight has 12 rows, expected num_kv_heads=2 times nope=6"),
        ({"up_weight": torch.randn(23, 7)}, r"up_weight has 23 rows, expected num_kv_heads=2 times nope=6"),
        ({"up_bias": torch.randn(7)}, r"up_bias has shape (7,), expected (E=22)"),
        ({"q": torch.randn(2, 5, 3, 10)}, r"H=5, expected a multiple of num_kv_heads=2"),
        ({"latent": torch.zeros(2, 9, 7).int()}, r"latent is torch.int32, expected a floating-point type"),
        ({"latent": torch.zeros(2, 9, 7).half()}, r"latent is torch.float16, expected torch.float32 as q"),
        ({"latent": torch.zeros(2, 9, 7, device="meta")}, r"latent is on meta, expected cpu as the first argument"),
        ({"key_scale_BKS": torch.rand(2, 9, 2)}, r"key_scale has shape (2, 9, 2), expected (B=2, 2, S=9)"),
        ({"mask": torch.ones(3, 8).bool()}, r"mask has shape (3, 8), expected (2, 6, 3, 9) or ones there"),
        ({"mask": torch.ones(3, 9).double()}, r"mask is torch.float64, expected torch.float32 as q"),
        ({"padding_BS": torch.ones(2, 8).bool()}, r"padding has shape (2, 8), expected (2, 9)"),
        ({"padding_BS": torch.ones(2, 9)}, r"padding is torch.float32, expected torch.bool"),
    ],
)
@pytest.mark.parametrize("function", [expanded_latent_attention, absorbed_latent_attention])
def test_what_does_not_fit_is_named(function: Callable[..., Tensor], changes: dict[str, Tensor], message: str) -> None:
    names = ("q", "latent", "key_rope", "up_weight", "up_bias")
    arguments = dict(zip(names, (t.detach().float() for t in operands(3, 9)), strict=True))
    options = {name: tensor for name, tensor in changes.items() if name not in names}
    arguments |= {name: tensor for name, tensor in changes.items() if name in names}
    if "up_weight" in changes:
        arguments["up_bias"] = None
    with pytest.raises(ValueError) as error:
        function(*arguments.values(), KV_HEADS, 0.3, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "lengths", "message"),
    [
        ([(1, 6, 9, 8), (1, 4, 9, 8), (1, 4, 9, 8)], None, "attend: H=6, expected a multiple of K=4"),
        (
            [(1, 6, 9, 8), (1, 2, 9, 7), (1, 2, 9, 8)],
            None,
            "attend: k has shape (1, 2, 9, 7), expected (B=1, K=2, S=9, D=8)",
        ),
        ([(1, 6, 9, 8), (1, 2, 8, 8), (1, 2, 8, 8)], None, "attend: T=9, expected at most S=8"),
        ([(1, 6, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8)], [4, 4], "attend: lengths add up to 8, expected T=9 and S=9, both"),
    ],
)
def test_attend_names_what_does_not_fit(shapes: list[tuple[int, ...]], lengths: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        attend(*(torch.randn(shape) for shape in shapes), None, 0.3, lengths)
    assert message in str(error.value)


def test_autocast_mixes_types() -> None:
    q, latent, *rest = (t.detach().float() for t in operands(3, 9))
    with torch.autocast("cpu", torch.bfloat16):
        for function in (expanded_latent_attention, absorbed_latent_attention):
            assert function(q, latent.bfloat16(), *rest, KV_HEADS, 0.3).isfinite().all()
