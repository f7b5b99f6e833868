"""The released HyLo checkpoints: reads one in its published format and writes it as a `hylo` model directory.

A release is one float32 model.safetensors, the hybrid's figures in hybrid_config.json, and config.json, which is the
base's. Ours differs in three things, each changed once, here: the names of the mixers' tensors; RoPE's pairs, which
releases take from neighbouring rows (2i, 2i+1) of the rotated part and we from its halves (j, j + rope/2); and the
configuration, which is one file and states the supported length.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor
from transformers import PreTrainedConfig

from hylo.checkpoint import Weights, check_dtype, copy_companions, names, read_base_config
from hylo.convert.config import hylo_config
from hylo.convert.write import ShardWriter
from hylo.errors import HyloError
from hylo.files import complete_directory, read_json
from hylo.geometry import complete_geometry
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.configuration import RELEASED

ROPE_PAIRINGS = ("interleaved", "half-split")
RopePairing = Literal["interleaved", "half-split"]
PREFIXES = {"mla": "mla", "gated_deltanet": "gdn", "mamba2": "mamba"}  # mixer -> its module in a release


def import_released(
    directory: Path,
    out: Path,
    *,
    rope_pairing: RopePairing = "interleaved",
    renames: Mapping[str, str] = {},
    lenient: bool = False,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the released checkpoint in `directory` to the new directory `out`, tensor by tensor.

    `rope_pairing`: which rows of the rotated part turn together; `half-split` takes them as they are.
    `renames` {OLD: NEW}: a tensor whose name is OLD, or ends in `.OLD`, is read as if that end were NEW (the longest
    OLD counts); what comes out is a released name or one of ours. `lenient` keeps unknown keys of hybrid_config.json as
    `released_config`. `dtype` of the written weights (default: the stored one); `progress(tensors done, tensors)`.
    A stored lm_head stays apart from the embedding even if config.json calls it tied.

    Raises HyloError, and writes nothing, if keys are unknown, missing or at odds with config.json, if tensors are
    missing, unexpected, of another shape or not finite, and if `out` exists.
    """
    if rope_pairing not in ROPE_PAIRINGS:
        raise HyloError(f"RoPE pairing {rope_pairing} is not known; choose one of {', '.join(ROPE_PAIRINGS)}")
    hybrid, unknown = read_hybrid_config(directory, lenient)
    base = read_base_config(directory)
    weights = Weights(directory)
    stored = renamed(weights, renames)
    config = released_config(directory, hybrid, base, set(stored))
    if unknown:
        config.released_config = unknown
    kept = {weights.dtypes[name] for name in stored.values()}
    config.dtype = check_dtype(dtype) if dtype else kept.pop() if len(kept) == 1 else torch.float32
    tensors = released_tensors(config)
    matched = _matched(directory, tensors, stored, weights)
    with complete_directory(out) as partial:
        writer = ShardWriter(partial, config.dtype)
        for done, (ours, tensor) in enumerate(tensors.items()):
            value = weights[matched[ours]]
            if rope_pairing == "interleaved" and tensor.rotated_block:
                value = halves_from_neighbours(value, tensor.rotated_block, config.qk_rope_head_dim)
            writer.add(ours, value)
            if progress is not None:
                progress(done + 1, len(tensors))
        writer.finish()
        config.save_pretrained(partial)
        copy_companions(directory, partial)


# The figures


PUBLISHED = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class RopeScaling(BaseModel):
    model_config = PUBLISHED

    factor: float = Field(ge=1)
    original_max_position_embeddings: PositiveInt
    rope_type: Literal["yarn", "default"] = "yarn"


class SsmConfig(BaseModel):
    model_config = PUBLISHED

    d_state: PositiveInt | None = None
    ngroups: PositiveInt | None = None
    expand: float | None = None  # d_inner says it
    repeat_kv_before_conv: bool = False


class HybridConfig(BaseModel):
    """hybrid_config.json. What has a default may be left out; one of the linear blocks' groups of keys decides."""

    model_config = PUBLISHED

    n_layer: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    rms_norm_eps: PositiveFloat
    hidden_act: str | None = None
    d_model: PositiveInt | None = None

    mla_layers: list[int]
    kv_lora_rank: PositiveInt
    q_lora_rank: PositiveInt
    qk_nope_head_dim: int = Field(ge=0)
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    max_position_embeddings: PositiveInt
    rope_theta: PositiveFloat
    rope_scaling: RopeScaling | None = None
    rope_type: Literal["yarn", "default"] | None = None  # rope_scaling says it
    use_lora_layer_norm: bool = False
    use_full_kv_head: bool = False
    attention_bias: bool = False
    attention_dropout: float | None = None  # of training
    qkv_rank_divisor: float | None = None  # the ranks say it

    gdn_num_heads: PositiveInt | None = None
    gdn_head_dim: PositiveInt | None = None

    ssm_cfg: SsmConfig | None = None
    d_inner: PositiveInt | None = None
    d_xb: PositiveInt | None = None


IN_CONFIG_JSON = {  # what both files state -> the base configuration's name for it
    "n_layer": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "d_model": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
}


def read_hybrid_config(directory: Path, lenient: bool = False) -> tuple[HybridConfig, dict[str, Any]]:
    """hybrid_config.json, and its unknown keys with their values, dotted where they are nested.

    Raises HyloError for missing and misformed keys, for the variants that no release uses, and for unknown keys unless
    `lenient`.
    """
    path = directory / RELEASED
    if directory.is_dir() and not path.exists():
        raise HyloError(
            f"{directory} is no released checkpoint: it holds no {RELEASED}; copy it there (bases are converted)"
        )
    try:
        hybrid = HybridConfig.model_validate(read_json(path, "hybrid configuration"))
    except ValidationError as error:
        items = [(".".join(map(str, item["loc"])), item) for item in error.errors()]
        missing = [key for key, item in items if item["type"] == "missing"]
        problems = [f"lacks {names(missing)}"] if missing else []
        problems += [f"has {key} {item['input']!r} ({item['msg']})" for key, item in items if key not in missing]
        raise HyloError(f"{path} {'; '.join(problems)}; restore the file") from None
    unknown = dict(hybrid.model_extra or {})
    for part in ("rope_scaling", "ssm_cfg"):
        nested = getattr(hybrid, part)
        unknown |= {f"{part}.{key}": value for key, value in (nested.model_extra or {}).items()} if nested else {}
    if unknown and not lenient:
        raise HyloError(
            f"{path} has unknown keys: {names(list(unknown))}; if they change nothing, keep them unread with --lenient"
        )
    variants = [key for key in ("use_lora_layer_norm", "use_full_kv_head", "attention_bias") if getattr(hybrid, key)]
    if hybrid.ssm_cfg and hybrid.ssm_cfg.repeat_kv_before_conv:
        variants.append("ssm_cfg.repeat_kv_before_conv")
    if variants:
        raise HyloError(f"{path} sets {names(variants)}; no release does, and such checkpoints are not read")
    return hybrid, unknown


def released_config(directory: Path, hybrid: HybridConfig, base: PreTrainedConfig, stored: set[str]) -> HyloConfig:
    """Our configuration; `stored` are the checkpoint's tensors, which decide between linear blocks and on the head.

    MLA's RoPE is the hybrid's own. Where YaRN stretches it, the supported length is factor * original length, otherwise
    the hybrid's max_position_embeddings; the base's is not looked at.
    """
    path = directory / RELEASED
    if base.model_type not in ("llama", "qwen3"):
        raise HyloError(f"{directory} has a base of model_type {base.model_type}; releases have llama or qwen3")
    stated = {key: (getattr(hybrid, key), getattr(base, theirs)) for key, theirs in IN_CONFIG_JSON.items()}
    if wrong := [f"{key} {a!r} (there {b!r})" for key, (a, b) in stated.items() if a is not None and a != b]:
        raise HyloError(f"{path} contradicts config.json: {names(wrong)}; restore the files")
    layers = hybrid.mla_layers
    if len(set(layers)) != len(layers) or not all(0 <= i < hybrid.n_layer for i in layers):
        raise HyloError(f"{path} has mla_layers {layers}; indices run from 0 to {hybrid.n_layer - 1}, each named once")
    linear = _linear_block(path, hybrid, stored) if len(layers) < hybrid.n_layer else ""
    mixers = ["mla" if i in layers else linear for i in range(hybrid.n_layer)]
    try:
        geometry = complete_geometry(base, _geometry(path, hybrid, linear))
    except HyloError as error:
        raise HyloError(f"{path} does not fit config.json: {error}") from None

    config = hylo_config(base, mixers, geometry, "recipe")
    config.architectures = [HyloForCausalLM.__name__]
    config.tie_word_embeddings = config.tie_word_embeddings and "lm_head.weight" not in stored
    config.mla_rope_parameters = {"rope_type": "default", "rope_theta": hybrid.rope_theta}
    config.max_position_embeddings = hybrid.max_position_embeddings
    if (scaling := hybrid.rope_scaling) and scaling.factor > 1:
        length = scaling.factor * scaling.original_max_position_embeddings
        if scaling.rope_type != "yarn" or not length.is_integer():
            raise HyloError(
                f"{path} has rope_scaling {scaling.rope_type} to {length:g} tokens; releases use yarn and whole numbers"
            )
        config.extend_context(int(length), scaling.original_max_position_embeddings)
    return config


def _linear_block(path: Path, hybrid: HybridConfig, stored: set[str]) -> str:
    """The mixer of the layers without MLA: what the keys say, or the tensors' names where they say both or nothing."""
    gdn = bool(hybrid.gdn_num_heads or hybrid.gdn_head_dim)
    mamba = bool(hybrid.d_inner or hybrid.d_xb or (hybrid.ssm_cfg and hybrid.ssm_cfg.d_state))
    if gdn == mamba:
        gdn, mamba = (any(f".{PREFIXES[kind]}." in name for name in stored) for kind in ("gated_deltanet", "mamba2"))
    if gdn == mamba:
        found = "both .gdn. and .mamba. tensors" if gdn else "neither .gdn. nor .mamba. tensors"
        raise HyloError(
            f"{path} leaves open which linear block it has, and there are {found}; restore gdn_* or ssm_cfg"
        )
    return "gated_deltanet" if gdn else "mamba2"


def _geometry(path: Path, hybrid: HybridConfig, linear: str) -> dict[str, int]:
    """HyloConfig's figures. A linear block without a single key has the published ones, by the base."""
    mla = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    geometry = {key: getattr(hybrid, key) for key in mla}
    ssm = hybrid.ssm_cfg or SsmConfig()
    given: dict[str, tuple[str, int | None]] = {}  # our name -> the key and its value
    if linear == "gated_deltanet":
        given = {key: (key, getattr(hybrid, key)) for key in ("gdn_num_heads", "gdn_head_dim")}
    elif linear == "mamba2":
        given = {
            "mamba_d_state": ("ssm_cfg.d_state", ssm.d_state),
            "mamba_num_heads": ("ssm_cfg.ngroups", ssm.ngroups),
            "mamba_d_inner": ("d_inner", hybrid.d_inner),
            "mamba_d_xb": ("d_xb", hybrid.d_xb),
        }
    missing = [key for key, value in given.values() if value is None]
    if missing and len(missing) < len(given):
        raise HyloError(f"{path} lacks {names(missing)}; restore the file")
    geometry |= {ours: value for ours, (_, value) in given.items() if value is not None}
    if "mamba_d_inner" in geometry:
        geometry["mamba_head_dim"] = geometry["mamba_d_inner"] // geometry["mamba_num_heads"]
    return geometry


# The tensors


@dataclass(frozen=True)
class ReleasedTensor:
    """A tensor's name in a release, its shape, and how many rows make a block whose last `rope` rows are rotated."""

    name: str
    shape: tuple[int, ...]
    rotated_block: int | None


def released_tensors(config: HyloConfig) -> dict[str, ReleasedTensor]:
    """What a release of this configuration holds, by our names, in the model's order. Qwen's norms: names assumed."""
    head = config.qk_nope_head_dim + config.qk_rope_head_dim
    blocks = {
        "mla.q_b_proj.weight": head,
        "mla.kv_a_proj_with_mqa.weight": config.kv_lora_rank + config.qk_rope_head_dim,
        "mla.q_norm.weight": head,
        "mla.k_norm.weight": head,
    }
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in HyloForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors = {}
    for ours, shape in shapes.items():
        theirs = ours
        if layer := re.match(r"model\.layers\.(\d+)\.mixer\.", ours):
            module = PREFIXES[config.mixers[int(layer[1])]]
            theirs = ours.replace(".mixer.", f".{module}.").replace(".mla.o_proj.", ".mla.out_proj.")
        tensors[ours] = ReleasedTensor(theirs, shape, blocks.get(theirs.split(".", 3)[-1]))
    return tensors


def renamed(weights: Weights, renames: Mapping[str, str]) -> dict[str, str]:
    """Names after `renames` -> names as stored. RoPE's buffers, which follow from the figures, are left out."""
    stored: dict[str, str] = {}
    unused = set(renames)
    for name in weights.shapes:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        matching = [old for old in renames if f".{name}".endswith(f".{old}")]
        unused -= set(matching)
        old = max(matching, key=len, default="")
        new = name.removesuffix(old) + renames.get(old, "")
        if new in stored:
            raise HyloError(f"tensors {stored[new]} and {name} are both read as {new}; mend the renaming (--map)")
        stored[new] = name
    if unused:
        example = sorted(unused)[0]
        raise HyloError(
            f"--map {example}={renames[example]} matches no tensor of {weights.directory}; mend its OLD part"
        )
    return stored


def _matched(
    directory: Path, tensors: Mapping[str, ReleasedTensor], stored: Mapping[str, str], weights: Weights
) -> dict[str, str]:
    """Our names -> names as stored, if every tensor is there once, in its shape, and nothing else is."""
    ours_of = {tensor.name: ours for ours, tensor in tensors.items()} | {ours: ours for ours in tensors}
    matched: dict[str, str] = {}
    unexpected = []
    for new, name in stored.items():
        if new not in ours_of:
            unexpected.append(name if new == name else f"{name} (read as {new})")
        elif (ours := ours_of[new]) in matched:
            raise HyloError(f"tensors {matched[ours]} and {name} of {directory} are both read as {ours}; mend --map")
        else:
            matched[ours] = name
    missing = [tensor.name for ours, tensor in tensors.items() if ours not in matched]
    wrong = [o for o, tensor in tensors.items() if o in matched and weights.shapes[matched[o]] != tensor.shape]
    problems = [f"lacks {names(missing)}"] if missing else []
    problems += [f"holds unexpected {names(unexpected)}"] if unexpected else []
    if wrong:
        shapes = f"{list(weights.shapes[matched[wrong[0]]])}, not {list(tensors[wrong[0]].shape)}"
        problems.append(f"has {names([matched[ours] for ours in wrong])} in another shape ({shapes})")
    if problems:
        cure = "rename with --map OLD=NEW or restore it" if missing and unexpected else "restore it"
        raise HyloError(f"{directory} {'; '.join(problems)}; {RELEASED} describes something else: {cure}")
    return matched


def halves_from_neighbours(rows: Tensor, block: int, rope: int) -> Tensor:
    """In every block of rows, the last `rope` rows (0, 1, 2, 3, ..) become (0, 2, .., 1, 3, ..): what turned with its
    neighbour then turns with the row rope/2 further on."""
    fixed = torch.arange(block - rope)
    rotated = torch.arange(rope).view(-1, 2).T.flatten() + (block - rope)
    return rows.unflatten(0, (-1, block))[:, torch.cat((fixed, rotated))].flatten(0, 1)
