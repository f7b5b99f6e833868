"""Conversion: a base directory and a plan in, a hybrid directory out, layer by layer."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from hylo.checkpoint import check_dtype, copy_companions
from hylo.convert.base import BaseCheckpoint, read_base
from hylo.convert.calibration import LayerSample, samples_of
from hylo.convert.config import planned_config
from hylo.convert.device import compute_device, moved
from hylo.convert.initialisation import Initialisation, LayerRanks
from hylo.convert.kda import fill_kda
from hylo.convert.linear import fill_gated_deltanet, fill_mamba2
from hylo.convert.linear_fit import FitResult
from hylo.convert.memory import release_freed
from hylo.convert.mla import fill_mla
from hylo.convert.record import NAME, initialisation_record
from hylo.convert.write import SHARD_BYTES, ShardWriter
from hylo.errors import HyloError
from hylo.files import complete_directory
from hylo.modeling import HyloForCausalLM
from hylo.modeling.gated_deltanet import GatedDeltaNet
from hylo.modeling.kda import KimiDeltaAttention
from hylo.modeling.mamba2 import Mamba2
from hylo.modeling.mla import MultiHeadLatentAttention
from hylo.modeling.rope import base_frequencies
from hylo.plan import Plan

Progress = Callable[[int, int], None]


def convert(
    base: Path,
    out: Path,
    plan: Plan,
    initialisation: Initialisation | None = None,
    seed: int = 0,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[int, FitResult]:
    """Writes the hybrid that `plan` describes, initialised from the base, to the new directory `out`.

    `seed` decides what is left to chance, layer by layer. `dtype` of the written weights (default: the plan's), in
    shards of at most `shard_bytes` where a tensor is not larger; `progress(layers done, layers)` is called after every
    layer. Memory holds one layer and one shard. Beside the weights, OUT/initialisation.json says what was chosen and
    what the ranks keep (`initialisation_record`). Returns how far calibrated linear blocks came, by layer.
    Raises HyloError for a base that cannot be read, an initialisation that does not fit and an `out` that exists or
    cannot be written.
    """
    initialisation = initialisation or Initialisation()
    initialisation.check(plan)
    checkpoint = read_base(base)
    if checkpoint.config.to_dict() != plan.base_config.to_dict():
        raise HyloError(f"the plan was made for another base than {base}; plan again")
    config = planned_config(plan, initialisation.init)
    config.dtype = check_dtype(dtype or plan.dtype)
    config.architectures = [HyloForCausalLM.__name__]
    with torch.device("meta"):
        model = HyloForCausalLM(config)
    layers = range(config.num_hidden_layers)
    fits: dict[int, FitResult] = {}
    ranks: list[LayerRanks] = []
    with complete_directory(out) as partial:
        writer = ShardWriter(partial, config.dtype, shard_bytes)
        writer.add("model.embed_tokens.weight", checkpoint["model.embed_tokens.weight"])
        for index, sample in zip(
            layers, samples_of(checkpoint, config, initialisation.sampled_by, layers), strict=True
        ):
            fit = _write_layer(writer, checkpoint, model, index, initialisation, sample, seed)
            if isinstance(fit, LayerRanks):
                ranks.append(fit)
            elif fit is not None:
                fits[index] = fit
            release_freed()
            if progress is not None:
                progress(index + 1, len(layers))
        writer.add("model.norm.weight", checkpoint["model.norm.weight"])
        if not config.tie_word_embeddings:
            writer.add("lm_head.weight", checkpoint["lm_head.weight"])
        writer.finish()
        config.save_pretrained(partial)
        record = initialisation_record(plan, initialisation, seed, ranks, fits)
        (partial / NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        copy_companions(base, partial)
    return fits


def _write_layer(
    writer: ShardWriter,
    checkpoint: BaseCheckpoint,
    model: HyloForCausalLM,
    index: int,
    initialisation: Initialisation,
    sample: LayerSample | None,
    seed: int,
) -> LayerRanks | FitResult | None:
    """The base's norms and MLP as they are, and the mixer. Returns how near it is to the attention, where known."""
    init = initialisation.init
    verbatim = model.config.mixers[index] == "attention" and init != "random"
    prefix = f"model.layers.{index}."
    for name in checkpoint.layer_names():
        if verbatim or not name.startswith("self_attn."):
            writer.add(prefix + name.replace("self_attn.", "mixer."), checkpoint[prefix + name])
    if verbatim:
        return None
    layer = model.model.layers[index]
    mixer = fresh_mixer(model, index, seed)
    fit: LayerRanks | FitResult | None = None
    if init != "random":
        attention = checkpoint.attention(index)
        if isinstance(mixer, MultiHeadLatentAttention):
            mla = fill_mla(mixer, attention, init, initialisation.rope_key_for(model.config.base_model_type), sample)
            fit = LayerRanks(index, mixer.rank, mla.kv_energy, model.config.q_lora_rank, mla.q_energy)
            if model.config.mla_inv_freq is not None:
                model.config.mla_inv_freq[index] = base_frequencies(model.config)[0][mla.pairs].tolist()
        else:
            device = compute_device()
            attention, sample = moved(attention, device), None if sample is None else moved(sample, device)
            norm = checkpoint[f"{prefix}input_layernorm.weight"].to(device, torch.float32)
            fraction, steps = initialisation.linear_fraction, initialisation.linear_steps
            mixer.to(device)
            with seeded(seed, index):
                if isinstance(mixer, GatedDeltaNet):
                    fit = fill_gated_deltanet(mixer, attention, initialisation.linear, sample, norm, fraction, steps)
                elif isinstance(mixer, Mamba2):
                    fit = fill_mamba2(mixer, attention, initialisation.linear, sample, norm, fraction, steps)
                elif isinstance(mixer, KimiDeltaAttention):
                    fit = fill_kda(mixer, attention, initialisation.linear, sample, norm, fraction, steps)
            mixer.to("cpu")
    for name, tensor in mixer.state_dict().items():
        writer.add(f"{prefix}mixer.{name}", tensor)
    layer.mixer = mixer.to("meta")
    return fit


def fresh_mixer(model: HyloForCausalLM, index: int, seed: int) -> nn.Module:
    """The mixer of one layer of a model on the meta device, on the CPU in float32 and randomly initialised."""
    mixer = model.model.layers[index].get_submodule("mixer")
    mixer.to_empty(device="cpu")
    with seeded(seed, index):
        mixer.apply(model._init_weights)
    return mixer


@contextlib.contextmanager
def seeded(seed: int, index: int) -> Iterator[None]:
    """Chance inside depends on the seed and the layer alone; chance outside does not notice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 100_003 + index)
        yield
