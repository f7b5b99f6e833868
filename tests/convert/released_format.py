"""Tiny checkpoints in the released format, and what they compute: float64, token by token, nothing of the library's.

A checkpoint here is (tensors by name, hybrid_config.json, config.json). The forward pass takes the published semantics
at their word: heads [nope | rope], neighbouring RoPE pairs, kv heads repeated, states updated one token at a time.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Json = dict[str, Any]
Release = tuple[Tensors, Json, Json]

TINY: Json = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "hidden_act": "silu",
    "n_layer": 3,
    "mla_layers": [1],
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "use_lora_layer_norm": False,
    "use_full_kv_head": False,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qkv_rank_divisor": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64, "rope_type": "yarn"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_type": "default",
    "d_model": 32,
}
GDN: Json = {"gdn_num_heads": 2, "gdn_head_dim": 12}
MAMBA: Json = {
    "ssm_cfg": {"expand": 1, "ngroups": 4, "d_state": 16, "repeat_kv_before_conv": False},
    "d_inner": 64,
    "d_xb": 32,
}
LLAMA: Json = {  # as earlier versions of transformers wrote it
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN: Json = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_scaling": None}
FAMILIES = {"llama": LLAMA, "qwen3": QWEN}
BLOCKS = {"gdn": GDN, "mamba": MAMBA}


def random_release(family: str, block: str, seed: int = 0, **changes: Any) -> Release:
    """Weights of a size at which every row of every tensor shows in the logits. `changes` to hybrid_config.json."""
    hybrid = TINY | BLOCKS[block] | changes
    base = base_config(family, hybrid, head_dim=16, vocab_size=61)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(hybrid, base, block).items():
        scale = 0.3 if len(shape) == 1 else 0.5 if "conv1d" in name else 1.5 * shape[-1] ** -0.5
        tensors[name] = scale * torch.randn(shape, generator=generator) + (1.0 if name.endswith("norm.weight") else 0.0)
    return tensors, hybrid, base


def base_config(family: str, hybrid: Json, head_dim: int, vocab_size: int) -> Json:
    same = ("hidden_size", "intermediate_size", "hidden_act", "rms_norm_eps", "num_attention_heads")
    return (
        FAMILIES[family]
        | {key: hybrid[key] for key in (*same, "num_key_value_heads", "rope_theta")}
        | {"num_hidden_layers": hybrid["n_layer"], "head_dim": head_dim, "vocab_size": vocab_size}
        | {"max_position_embeddings": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 2}
    )


def shapes(hybrid: Json, base: Json, block: str) -> dict[str, tuple[int, ...]]:
    D, F, V = hybrid["hidden_size"], hybrid["intermediate_size"], base["vocab_size"]
    H, K = hybrid["num_attention_heads"], hybrid["num_key_value_heads"]
    nope, rope, v = hybrid["qk_nope_head_dim"], hybrid["qk_rope_head_dim"], hybrid["v_head_dim"]
    r_q, r_kv = hybrid["q_lora_rank"], hybrid["kv_lora_rank"]
    mla: dict[str, tuple[int, ...]] = {
        "mla.q_a_proj.weight": (r_q, D),
        "mla.q_b_proj.weight": (H * (nope + rope), r_q),
        "mla.kv_a_proj_with_mqa.weight": (r_kv + rope, D),
        "mla.kv_b_proj.weight": (K * (nope + v), r_kv),
        "mla.out_proj.weight": (D, H * v),
    }
    if base["model_type"] == "qwen3":
        mla |= {"mla.q_norm.weight": (nope + rope,), "mla.k_norm.weight": (nope + rope,)}
    if block == "gdn":
        heads, width = hybrid["gdn_num_heads"], hybrid["gdn_head_dim"]
        key, value = heads * width, 2 * heads * width
        linear: dict[str, tuple[int, ...]] = {
            **{f"gdn.{name}_proj.weight": (n, D) for name, n in (("q", key), ("k", key), ("v", value), ("g", value))},
            **{f"gdn.{name}_proj.weight": (heads, D) for name in "ab"},
            **{f"gdn.{name}_conv1d.weight": (n, 1, 4) for name, n in (("q", key), ("k", key), ("v", value))},
            **{f"gdn.{name}": (heads,) for name in ("A_log", "dt_bias")},
            "gdn.o_norm.weight": (2 * width,),
            "gdn.o_proj.weight": (D, value),
        }
    else:
        d_inner, d_xb, heads = hybrid["d_inner"], hybrid["d_xb"], hybrid["ssm_cfg"]["ngroups"]
        linear = {
            "mamba.in_proj.weight": (2 * d_inner + 2 * d_xb + heads, D),
            "mamba.conv1d.weight": (d_inner + 2 * d_xb, 1, 4),
            "mamba.conv1d.bias": (d_inner + 2 * d_xb,),
            **{f"mamba.{name}": (heads,) for name in ("A_log", "dt_bias", "D")},
            "mamba.norm.weight": (d_inner,),
            "mamba.out_proj.weight": (D, d_inner),
        }
    rest = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    found["lm_head.weight"] = (V, D)
    for i in range(hybrid["n_layer"]):
        mixer = mla if i in hybrid["mla_layers"] else linear
        found |= {f"model.layers.{i}.{name}": shape for name, shape in (mixer | rest).items()}
    return found


def write(directory: Path, release: Release) -> Path:
    tensors, hybrid, base = release
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "hybrid_config.json").write_text(json.dumps(hybrid))
    (directory / "config.json").write_text(json.dumps(base))
    return directory


def forward(release: Release, tokens_T: Tensor, neighbours: bool = True) -> Tensor:
    """Logits (T,V) of one sequence. `neighbours`: RoPE turns (2i, 2i+1), otherwise (i, i + rope/2)."""
    tensors, hybrid, _ = release
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    eps = hybrid["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][tokens_T]
    for i in range(hybrid["n_layer"]):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        h = rms_norm(x, layer["input_layernorm.weight"], eps)
        if i in hybrid["mla_layers"]:
            x = x + mla(layer, hybrid, h, neighbours)
        else:
            x = x + (gdn(layer, hybrid, h) if "gdn.A_log" in layer else mamba(layer, hybrid, h))
        h = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T


def mla(layer: Tensors, hybrid: Json, x_TD: Tensor, neighbours: bool) -> Tensor:
    H, K = hybrid["num_attention_heads"], hybrid["num_key_value_heads"]
    nope, rank = hybrid["qk_nope_head_dim"], hybrid["kv_lora_rank"]
    T = len(x_TD)
    q = (x_TD @ layer["mla.q_a_proj.weight"].T @ layer["mla.q_b_proj.weight"].T).view(T, H, -1)
    down = x_TD @ layer["mla.kv_a_proj_with_mqa.weight"].T
    up = (down[:, :rank] @ layer["mla.kv_b_proj.weight"].T).view(T, K, -1)
    k = torch.stack([torch.cat((up[:, h // (H // K), :nope], down[:, rank:]), -1) for h in range(H)], 1)
    v = torch.stack([up[:, h // (H // K), nope:] for h in range(H)], 1)
    if "mla.q_norm.weight" in layer:  # over the whole head, before it is rotated
        q = rms_norm(q, layer["mla.q_norm.weight"], hybrid["rms_norm_eps"])
        k = rms_norm(k, layer["mla.k_norm.weight"], hybrid["rms_norm_eps"])
    q, k = (torch.cat((t[..., :nope], turn(t[..., nope:], hybrid, neighbours)), -1) for t in (q, k))
    out = torch.zeros_like(v)
    for t in range(T):
        for h in range(H):
            weights = (k[: t + 1, h] @ q[t, h] / math.sqrt(q.shape[-1])).softmax(0)
            out[t, h] = weights @ v[: t + 1, h]
    return out.flatten(1) @ layer["mla.out_proj.weight"].T


def frequencies(hybrid: Json) -> tuple[list[float], float]:
    """Radians a token of each pair, and the factor on cos and sin; YaRN where its factor is over 1."""
    width, theta, scaling = hybrid["qk_rope_head_dim"], hybrid["rope_theta"], hybrid.get("rope_scaling")
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if scaling is None or scaling["factor"] == 1:
        return plain, 1.0
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def index(turns: float) -> float:  # of the pair that turns so many times within the original length
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), width - 1)
    slow = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    return [f * (1 - s) + f / factor * s for f, s in zip(plain, slow, strict=True)], 0.1 * math.log(factor) + 1


def turn(x_THr: Tensor, hybrid: Json, neighbours: bool) -> Tensor:
    angular, factor = frequencies(hybrid)
    out = torch.empty_like(x_THr)
    for i, frequency in enumerate(angular):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + len(angular))
        angle = (torch.arange(len(x_THr), dtype=torch.float64) * frequency)[:, None]
        cos, sin = factor * angle.cos(), factor * angle.sin()
        out[..., a] = x_THr[..., a] * cos - x_THr[..., b] * sin
        out[..., b] = x_THr[..., a] * sin + x_THr[..., b] * cos
    return out


def gdn(layer: Tensors, hybrid: Json, x_TD: Tensor) -> Tensor:
    heads, width = hybrid["gdn_num_heads"], hybrid["gdn_head_dim"]

    def mixed(name: str) -> Tensor:
        return conv4(x_TD @ layer[f"gdn.{name}_proj.weight"].T, layer[f"gdn.{name}_conv1d.weight"])

    q, k, v = (mixed(name).view(len(x_TD), heads, -1) for name in "qkv")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = torch.sigmoid(x_TD @ layer["gdn.b_proj.weight"].T)
    g = -layer["gdn.A_log"].exp() * softplus(x_TD @ layer["gdn.a_proj.weight"].T + layer["gdn.dt_bias"])
    out = torch.zeros_like(v)
    for h in range(heads):
        S = x_TD.new_zeros(width, 2 * width)
        for t in range(len(x_TD)):
            S = g[t, h].exp() * S
            S = S + torch.outer(k[t, h], beta[t, h] * (v[t, h] - S.T @ k[t, h]))
            out[t, h] = S.T @ q[t, h] / math.sqrt(width)
    out = rms_norm(out, layer["gdn.o_norm.weight"], hybrid["rms_norm_eps"]).flatten(1)
    return (out * silu(x_TD @ layer["gdn.g_proj.weight"].T)) @ layer["gdn.o_proj.weight"].T


def mamba(layer: Tensors, hybrid: Json, x_TD: Tensor) -> Tensor:
    d_inner, d_xb, heads = hybrid["d_inner"], hybrid["d_xb"], hybrid["ssm_cfg"]["ngroups"]
    N, P, T = hybrid["ssm_cfg"]["d_state"], d_inner // heads, len(x_TD)
    z, xBC, dt = (x_TD @ layer["mamba.in_proj.weight"].T).split([d_inner, d_inner + 2 * d_xb, heads], -1)
    x, B, C = conv4(xBC, layer["mamba.conv1d.weight"], layer["mamba.conv1d.bias"]).split([d_xb, d_xb, d_inner], -1)
    x, B, C = x.view(T, -1, P), B.view(T, -1, N), C.view(T, -1, N)
    dt = softplus(dt + layer["mamba.dt_bias"])
    y = x_TD.new_zeros(T, heads, P)
    for head in range(heads):
        kv_head = head // (heads // x.shape[1])
        state = x_TD.new_zeros(P, N)
        for t in range(T):
            decay = (-layer["mamba.A_log"][head].exp() * dt[t, head]).exp()
            state = decay * state + dt[t, head] * torch.outer(x[t, kv_head], B[t, kv_head])
            y[t, head] = state @ C[t, head] + layer["mamba.D"][head] * x[t, kv_head]
    gated = y * silu(z).view(T, heads, P)
    normed = rms_norm(gated, layer["mamba.norm.weight"].view(heads, P), hybrid["rms_norm_eps"])
    return normed.flatten(1) @ layer["mamba.out_proj.weight"].T


def conv4(x_TC: Tensor, weight_C1W: Tensor, bias_C: Tensor | None = None) -> Tensor:
    out = torch.zeros_like(x_TC) if bias_C is None else bias_C.expand_as(x_TC).clone()
    for t in range(len(x_TC)):
        for back in range(min(t, 3) + 1):
            out[t] += weight_C1W[:, 0, 3 - back] * x_TC[t - back]
    return silu(out)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()
