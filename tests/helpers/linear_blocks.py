"""A small attention, a sample of it, and a configuration whose linear blocks have just its heads."""

import torch
from torch import Tensor, nn

from hylo.convert import BaseAttention
from hylo.convert.calibration import LayerSample
from hylo.modeling import HyloConfig

H, K, D_HEAD, D = 4, 2, 8, 24
NORM = torch.linspace(0.5, 1.5, D)


def attention(norms: bool = False, biases: bool = False) -> BaseAttention:
    shapes = ((H, D_HEAD, D), (K, D_HEAD, D), (K, D_HEAD, D), (D, H, D_HEAD))
    return BaseAttention(
        *(torch.randn(shape) / 4 for shape in shapes),
        *((torch.rand(D_HEAD), torch.rand(D_HEAD)) if norms else (None, None)),
        *((torch.randn(heads, D_HEAD) for heads in (H, K, K)) if biases else (None, None, None)),
    )


def sample_of(base: BaseAttention, sequences: int = 4, tokens: int = 20) -> LayerSample:
    """The attention, without rotation and norms, over inputs that have a mean, as those of trained models do."""
    x = torch.randn(sequences, tokens, D) + 1.5 * torch.randn(D)
    x = NORM * nn.functional.rms_norm(x, (D,))
    biases = (base.q_bias, base.k_bias, base.v_bias)
    q, k, v = (
        torch.einsum("btx,hdx->bthd", x, rows) + (0 if bias is None else bias)
        for rows, bias in zip((base.q, base.k, base.v), biases, strict=True)
    )
    context = nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    return LayerSample(x, torch.einsum("bthd,xhd->btx", context, base.o), context, q, k, D_HEAD**-0.5)


def config(**fields: int) -> HyloConfig:
    mamba = {
        "mamba_d_state": D_HEAD,
        "mamba_head_dim": D_HEAD,
        "mamba_num_heads": H,
        "mamba_d_inner": H * D_HEAD,
        "mamba_d_xb": K * D_HEAD,
        "gdn_num_heads": 2,
        "gdn_head_dim": 8,
        "kda_num_heads": H,
        "kda_head_dim": D_HEAD,
    }
    return HyloConfig(hidden_size=D, num_hidden_layers=1, mixers=["gated_deltanet"], **mamba | fields)


def state(mixer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in mixer.state_dict().items()}


def per_head(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def same_direction(ours: Tensor, theirs: Tensor) -> bool:
    """Whether ours is theirs times a positive number."""
    return torch.allclose(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6)
