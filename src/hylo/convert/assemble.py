"""A hybrid from two students that are aligned whole: each layer is picked from the one or the other.

Alignment feeds every layer the base's hidden state, so that a layer does not know what its neighbours became. An
all-MLA and an all-linear student, each aligned once, thus hold every layout's aligned layers (arXiv 2604.24715).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hylo.checkpoint import Weights, check_dtype, copy_companions, dtype_of
from hylo.convert.write import SHARD_BYTES, ShardWriter
from hylo.errors import HyloError
from hylo.files import complete_directory
from hylo.geometry import KEYS
from hylo.layout import is_attention_like
from hylo.modeling import HyloConfig
from hylo.modeling.loading import check_complete, checkpoint_shapes, read_configuration, read_hylo_config

LINEAR_KEYS = tuple(key for key in KEYS if key.startswith(("conv_", "gdn_", "mamba_", "kda_")))
MLA_KEYS = (*(key for key in KEYS if key not in LINEAR_KEYS), "mla_k_norm", "mla_rope_parameters", "attention_gate")
LAYER_KEYS = ("mixers", "mla_inv_freq", "kv_lora_ranks")  # an entry for every layer, or None
FILE_KEYS = ("transformers_version", "architectures", "auto_map", "_name_or_path")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

Progress = Callable[[int, int], None]


def assemble(
    all_mla: Path,
    all_linear: Path,
    out: Path,
    attention_layers: Sequence[int],
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes to the new directory `out` the hybrid whose `attention_layers` are those of `all_mla` (MLA, or the base's
    own attention) and whose other layers are those of `all_linear` (Gated DeltaNet, Mamba-2 or KDA).

    The final norm goes with the last layer. `all_linear` may as well be a hybrid that has the layers in question.
    Weights are read and written tensor by tensor; memory holds the embedding and one shard.
    `progress(tensors done, tensors)` is called after each.
    Raises HyloError for what is no complete hylo directory, for two that do not come from one base in one way, for
    layers that are not there or of the other kind, and for an `out` that exists.
    """
    config = hybrid_config(all_mla, all_linear, attention_layers)
    growing, linear = Weights(all_mla), Weights(all_linear)
    with complete_directory(out) as partial:
        for name in (EMBEDDING, HEAD):
            if name in growing.shapes and name in linear.shapes and not torch.equal(growing[name], linear[name]):
                raise HyloError(
                    f"{all_mla} and {all_linear} differ in {name}, which alignment leaves as it is; "
                    "align two students of one base"
                )

        def picked(name: str) -> Tensor:
            return (growing if layer_of(name, config) in (None, *attention_layers) else linear)[name]

        write_directory(partial, config, picked, progress, shard_bytes)
        copy_companions(all_mla, partial)


def write_directory(
    directory: Path,
    config: HyloConfig,
    tensor: Callable[[str], Tensor],
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and the weights, each of which `tensor(name)` gives when its turn comes, in config's dtype."""
    names = list(checkpoint_shapes(config))
    writer = ShardWriter(directory, check_dtype(dtype_of(config)), shard_bytes)
    for done, name in enumerate(names, 1):
        writer.add(name, tensor(name))
        if progress is not None:
            progress(done, len(names))
    writer.finish()
    config.save_pretrained(directory)


def complete_config(directory: Path) -> HyloConfig:
    """The configuration of a hylo directory. Raises HyloError if it is none, or if tensors are not there as it says."""
    if (model_type := read_configuration(directory)["model_type"]) != HyloConfig.model_type:
        raise HyloError(f"{directory} holds a {model_type} model, not a hylo one; convert it first")
    check_complete(directory)
    return read_hylo_config(directory)


def layer_of(name: str, config: HyloConfig) -> int | None:
    """The layer that a tensor belongs to, in alignment too: the final norm to the last; None: embedding and head."""
    if name == NORM:
        return config.num_hidden_layers - 1
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def hybrid_config(all_mla: Path, all_linear: Path, attention_layers: Sequence[int]) -> HyloConfig:
    """Each kind of mixer with the geometry that its own directory gives it; all else must be the same in both."""
    growing, linear = (complete_config(directory).to_dict() for directory in (all_mla, all_linear))
    own = {*LINEAR_KEYS, *MLA_KEYS, *LAYER_KEYS, *FILE_KEYS}
    for key in sorted((growing.keys() | linear.keys()) - own):
        if (a := growing.get(key)) != (b := linear.get(key)):
            raise HyloError(f"{key} is {a} in {all_mla} and {b} in {all_linear}; convert and align both alike")
    _check_layers(attention_layers, (all_mla, growing["mixers"]), (all_linear, linear["mixers"]))
    geometry = {key: linear[key] for key in LINEAR_KEYS}
    return HyloConfig(**(growing | geometry | _layer_entries(growing, linear, attention_layers)))


def _layer_entries(
    growing: Mapping[str, Any], linear: Mapping[str, Any], attention_layers: Sequence[int]
) -> dict[str, list[Any] | None]:
    """What configurations list for every layer, of the layers picked; where a layer has no MLA it is None, or 0."""
    layers = range(len(growing["mixers"]))
    elsewhere = {"mixers": linear["mixers"], "mla_inv_freq": [None] * len(layers), "kv_lora_ranks": [0] * len(layers)}
    return {
        key: growing[key] and [(growing[key] if i in attention_layers else others)[i] for i in layers]
        for key, others in elsewhere.items()
    }


def _check_layers(picked: Sequence[int], growing: tuple[Path, list[str]], linear: tuple[Path, list[str]]) -> None:
    layers = range(len(growing[1]))
    if outside := [i for i in picked if i not in layers]:
        raise HyloError(f"layer {outside[0]} is none of {growing[0]}; indices run from 0 to {layers[-1]}")
    if len(set(picked)) != len(picked):
        raise HyloError(f"attention layers {list(picked)} name a layer twice; name each once")
    for i in layers:
        directory, mixers = growing if i in picked else linear
        if is_attention_like(mixers[i]) != (i in picked):
            wanted = "MLA or attention" if i in picked else "a linear block"
            raise HyloError(
                f"layer {i} of {directory} is {mixers[i]}, not {wanted}; give the all-MLA directory first, then the "
                "all-linear one, or name other layers"
            )
