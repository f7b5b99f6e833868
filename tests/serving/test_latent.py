"""Decoding from paged latents against the same over one tensor of all tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata

from hylo.serve import latent
from hylo.serve.latent import PART, naive_read_latents, read_latents

HEADS, WIDTH, RANK, SCALE = 4, 40, 24, 0.2
FIGURES: dict[str, Any] = dict.fromkeys(
    ("num_reqs", "max_query_len", "max_seq_len", "num_actual_tokens", "num_decodes", "num_decode_tokens"), 1
) | {"query_start_loc": None, "slot_mapping": None, "num_prefills": 0, "head_dim": 128 + 64}
CASES = {
    "one block": (16, [3], 9),
    "blocks here and there": (16, [3, 9, 1, 0, 7], 75),
    "large blocks in two runs": (512, [3, 4, 5, 0, 1], 2500),
    "a run of small blocks": (16, list(range(2, 160)), 2500),
    "one long run": (PART, list(range(5)), 4 * PART + 1),
    "more parts than tokens": (16, [2], 1),
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_read_latents(case: str, contiguous: bool) -> None:
    size, blocks, length = CASES[case]
    torch.manual_seed(0)
    pages = torch.randn(max(blocks) + 1, 2, size, WIDTH, dtype=torch.float64)
    cache = pages[:, 1].contiguous() if contiguous else pages[:, 1]
    arguments = torch.randn(HEADS, WIDTH, dtype=torch.float64), cache, torch.tensor(blocks), length, RANK, SCALE
    torch.testing.assert_close(read_latents(*arguments), naive_read_latents(*arguments), rtol=1e-12, atol=1e-12)


def test_read_latents_in_bfloat16() -> None:
    torch.manual_seed(0)
    q, cache = torch.randn(HEADS, WIDTH).bfloat16(), torch.randn(8, 64, WIDTH).bfloat16()
    blocks = torch.tensor([5, 6, 1, 0])
    context = read_latents(q, cache, blocks, 250, RANK, SCALE)
    expected = naive_read_latents(q.double(), cache.double(), blocks, 250, RANK, SCALE)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.double(), expected, rtol=0.02, atol=0.02)


def test_on_gpus_vllms_triton_backend_takes_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be told without one: what is asked of vLLM's classes is there."""
    monkeypatch.setattr(latent, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    backend = latent.latent_backend.__wrapped__()
    assert backend.get_name() == "TRITON_MLA" and backend.supports_head_size(128 + 64)
    with pytest.raises(ValueError, match="not supported by MLA"):
        MLACommonMetadata(**FIGURES)
    assert latent.LatentMetadata(**FIGURES).head_dim == 192
