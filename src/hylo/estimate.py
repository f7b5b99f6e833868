"""What a stage costs before it runs: the memory of a device at its fullest moment, and the arithmetic of a token.

Weights are held and trained in float32 (bf16 computes on copies), AdamW keeps two numbers for each weight that trains,
and a frozen teacher has its weights alone. What a batch adds is found by running the models' own code on fake tensors
(hylo.live_bytes), so that it follows the code; the losses' tiles are counted as hylo.ops makes them. A step goes
through moments (the teacher's pass, the student's forward, the loss, the backward pass, the optimiser's step), and the
largest one is the estimate. With several devices weights, gradients, optimiser state and teacher are cut into equal
parts (hylo.distill.sharding), and one layer at a time is whole.

Not counted: what a process holds once everything is imported, pages of the data, and what an allocator cannot use
again; benchmarks/training_memory.py measures by how much that misses.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hylo.distill.settings import DIVERGENCES, Training
from hylo.live_bytes import Moment, fake_tensors, largest, trace_decoder, trace_layer
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.ops.gated_delta import CHUNK as GDN_CHUNK
from hylo.ops.head_tiles import tile_height
from hylo.ops.kda import CHUNK as KDA_CHUNK
from hylo.ops.ssd import CHUNK as SSD_CHUNK

FLOAT = 4
FULL_LOGITS = {"dpo": 3, "on_policy": 6}  # float32 copies of all logits that TRL's trainers hold, about


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the fullest moment of a step.

    `weights`, `gradients`, `optimiser`: the student's, with the layer that is whole at a time where they are sharded;
    `activations`: what the batch makes of the student, and copies of weights in bf16; `loss`: tiles, heads in bf16, and
    hidden states' gradients; `teacher`: its weights, what it says, and while it runs its work space.
    """

    moment: str
    weights: float
    gradients: float
    optimiser: float
    activations: float
    loss: float
    teacher: float

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def stage_memory(
    training: Training,
    student: HyloConfig,
    teacher: PreTrainedConfig | None = None,
    teacher_dtype: torch.dtype = torch.float32,
    devices: int = 1,
    packed: bool = False,
) -> Memory:
    """One device's memory at the fullest moment of a stage.

    `teacher`: the base's configuration for objective layers, else that of the model distilled from, which is not looked
    at where none runs; `teacher_dtype`: what its weights are stored in. `packed`: rows hold several documents, which
    transformers' teachers keep apart by a mask of length by length, and its copy in the type that they compute in.
    """
    with fake_tensors():
        if training.kind == "layers":
            assert teacher is not None
            moments = list(_by_layer(training, student, teacher, devices))
        else:
            live = teacher if training.teacher_source == "live" else None
            moments = list(_all_at_once(training, student, live, teacher_dtype, devices))
    if packed:
        mask = batch(training, devices)[0] * training.length * (1 + (2 if training.precision == "bf16" else FLOAT))
        moments = [replace(m, teacher=m.teacher + mask) if m.moment == "teacher" else m for m in moments]
    return max(moments, key=lambda memory: memory.total)


def _all_at_once(
    training: Training, config: HyloConfig, taught_by: PreTrainedConfig | None, dtype: torch.dtype, devices: int
) -> Iterator[Memory]:
    """The moments of every objective but layers."""
    bf16 = training.precision == "bf16"
    model = HyloForCausalLM(config).train()
    _choose_weights(model, training.trains)
    if training.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    own = trace_decoder(model, bf16)
    tokens, accumulates = batch(training, devices)
    factor, (whole, whole_gradients) = tokens / own.tokens, _gathered(model, devices)
    trained = _bytes(p for p in model.parameters() if p.requires_grad) / devices
    head = model.lm_head.weight
    of_head = _bytes([head]) / devices if head.requires_grad else 0.0
    weights, before = _bytes(model.parameters()) / devices + whole, trained if accumulates else 0.0

    teacher = spoken = 0.0
    if training.kind == "dpo":  # the student as it was
        teacher = weights
    elif taught_by is not None:
        frozen = _frozen(taught_by, dtype if bf16 else torch.float32)
        teacher = _bytes(frozen.parameters()) / devices + _gathered(frozen, devices)[0]
        said = trace_decoder(frozen, bf16)
        space = largest(said.forward, tokens / said.tokens)
        yield Memory("teacher", weights, before, 2 * trained, 0.0, 0.0, teacher + space.fixed + space.tokens)
        spoken = said.kept.scaled(tokens / said.tokens).tokens

    def at(moment: str, now: Moment, gradients: float = 0.0, loss: float = 0.0, spoken: float = 0.0) -> Memory:
        gradients = trained if accumulates else gradients + now.gradients / devices  # added to those that are there
        passing = whole_gradients if moment == "backward" else 0.0
        return Memory(moment, weights, gradients + passing, 2 * trained, now.fixed + now.tokens, loss, teacher + spoken)

    losses = len(training.objective) * (of_head + tokens * config.hidden_size * FLOAT)
    losses += _tiles(training, config, taught_by, dtype, tokens, devices)
    yield at("forward", largest(own.forward, factor), spoken=spoken)
    yield at("loss", own.kept.scaled(factor), loss=losses, spoken=spoken)
    yield at("backward", largest(own.backward, factor), gradients=of_head)
    yield Memory("optimiser", weights, trained, 2 * trained, 0.0, 0.0, teacher)


def _by_layer(training: Training, config: HyloConfig, base: PreTrainedConfig, devices: int) -> Iterator[Memory]:
    """The moments of objective layers: the base's pass, then one layer after the other, group by group."""
    bf16 = training.precision == "bf16"
    model, teacher = HyloForCausalLM(config).train(), _frozen(base, torch.float32)
    tokens, accumulates = batch(training, devices)
    layers = [i for i, mixer in enumerate(config.mixers) if mixer != "attention"]
    at_once = training.layers_at_once or len(layers)
    said = trace_decoder(teacher, bf16, keeps_states=True)
    states, most = said.kept.scaled(tokens / said.tokens), largest(said.forward, tokens / said.tokens)
    traces = {config.mixers[i]: trace_layer(model, i, bf16) for i in layers}
    sizes = [_bytes(layer.parameters()) / devices for layer in model.model.layers]
    base_sizes = [_bytes(layer.parameters()) / devices for layer in teacher.model.layers]
    (whole, whole_gradients), (whole_base, _) = _gathered(model, devices, False), _gathered(teacher, devices)

    for group in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        seen = (group[-1] + 1) / config.num_hidden_layers  # of the base, and of what it says
        trained = sum(sizes[i] for i in group)
        weights = trained + whole
        held = _bytes([teacher.model.embed_tokens.weight]) / devices + sum(base_sizes[: group[-1] + 1]) + whole_base
        arrived = trained if accumulates else 0.0
        space = most.fixed + most.tokens - (1 - seen) * states.tokens
        yield Memory("teacher", weights, arrived, 2 * trained, 0.0, 0.0, held + space)
        held += seen * states.tokens
        for i in group:
            own = traces[config.mixers[i]]
            now = largest(own.backward, tokens / own.tokens)
            arriving = whole_gradients + (0.0 if accumulates else now.gradients / devices)
            yield Memory(f"layer {i}", weights, arrived + arriving, 2 * trained, now.fixed + now.tokens, 0.0, held)
            arrived += 0.0 if accumulates else sizes[i]


def batch(training: Training, devices: int = 1) -> tuple[int, bool]:
    """Tokens that a device takes at once, and whether a step needs several such passes."""
    rows = training.micro_rows or max(1, training.rows // devices)
    tokens = rows * training.length
    return tokens * (2 if training.kind == "dpo" else 1), training.rows > rows * devices  # chosen and rejected


def _tiles(
    training: Training,
    config: HyloConfig,
    teacher: PreTrainedConfig | None,
    teacher_dtype: torch.dtype,
    tokens: int,
    devices: int,
) -> float:
    """What a loss takes beside its gradients: heads in the products' type, and the tiles (or TRL's whole logits)."""
    vocabulary = config.vocab_size / devices
    if training.kind in FULL_LOGITS:
        return FULL_LOGITS[training.kind] * tokens * config.vocab_size * FLOAT
    bf16, tiles = training.precision == "bf16", 0.0
    for name in training.objective:
        two = name in DIVERGENCES and teacher is not None
        heads = 2 * vocabulary * config.hidden_size if bf16 else 0.0
        if two and bf16 and teacher_dtype != torch.bfloat16:
            assert teacher is not None
            heads += 2 * vocabulary * teacher.hidden_size
        per_token = (2 if two else 1) * vocabulary * FLOAT
        height = tile_height(tokens * devices, int(vocabulary), int(per_token))
        tiles = max(tiles, heads + height * per_token)
    return tiles


def _choose_weights(model: HyloForCausalLM, trains: str) -> None:
    if trains == "mixers":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.get_submodule("mixer").requires_grad_(True)
    elif trains == "all_but_head":  # which is then one of its own
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight), requires_grad=False)


def _frozen(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _gathered(model: PreTrainedModel, devices: int, embedding: bool = True) -> tuple[float, float]:
    """What is whole at a time of a model that is sharded: weights (the embedding, or a layer and the next), and
    gradients (of the largest of these, and a copy to be shared out)."""
    if devices == 1:
        return 0.0, 0.0
    layer = max(_bytes(layer.parameters()) for layer in model.model.layers)
    embedded = _bytes([model.model.embed_tokens.weight]) if embedding else 0.0
    return max(2 * layer, embedded), 2 * max(layer, embedded)


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def flops(config: PreTrainedConfig, length: int) -> float:
    """Of a token of a sequence of `length` tokens, on average over its causal positions; the head included.

    Counted are the matrix products: of weights, of queries with the keys and values before them, and of the chunks and
    states of recurrences.
    """
    return decoder_flops(config, length) + 2 * config.vocab_size * config.hidden_size


def decoder_flops(config: PreTrainedConfig, length: int) -> float:
    """The same without the head."""
    return sum(layer_flops(config, length))


def layer_flops(config: PreTrainedConfig, length: int) -> list[float]:
    """Of every layer, for one token."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mixers = config.mixers if isinstance(config, HyloConfig) else ["attention"] * config.num_hidden_layers
    return [
        2 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
        + _mixing(config, mixer, length)
        for layer, mixer in zip(model.model.layers, mixers, strict=True)
    ]


def stage_flops(
    training: Training,
    student: HyloConfig,
    teacher: PreTrainedConfig | None = None,
    layers: Sequence[int] | None = None,
) -> float:
    """Of one token of a stage: three forward passes of what trains (its backward pass is worth two), one of a teacher.

    What checkpointing computes twice is not counted. `teacher`: the base for objective layers, of which `layers` (all
    that are no attention if left out) are aligned, and the base runs up to the last of them.
    """
    T = training.length
    if training.kind == "layers":
        assert teacher is not None
        own, base = layer_flops(student, T), layer_flops(teacher, T)
        chosen = [i for i, mixer in enumerate(student.mixers) if mixer != "attention"] if layers is None else layers
        return 3 * sum(own[i] for i in chosen) + sum(base[: max(chosen) + 1])
    reference = student if training.kind == "dpo" else teacher if training.teacher_source == "live" else None
    return 3 * flops(student, T) + (0.0 if reference is None else flops(reference, T))


def _mixing(config: PreTrainedConfig, mixer: str, length: int) -> float:
    """Of what a mixer does between its projections."""
    if mixer in ("attention", "mla"):
        heads, head_dim = config.num_attention_heads, config.head_dim
        return 2 * heads * 2 * head_dim * (length + 1) / 2  # logits, and their softmax times the values
    assert isinstance(config, HyloConfig)
    if mixer == "gated_deltanet":
        K, V, C = config.gdn_head_dim, config.gdn_head_dim * config.gdn_expand_v, min(GDN_CHUNK, length)
        # states read by keys and queries, and written; keys and queries with keys, the system's solution, and writes
        return config.gdn_num_heads * (6 * K * V + 4 * C * K + 4 * C * V + C * C)
    if mixer == "kda":
        K, C = config.kda_head_dim, min(KDA_CHUNK, length)
        # as above, but that every pair of tokens meets in one doubling only
        return config.kda_num_heads * (6 * K * K + 2 * C * K + 4 * C * K + C * C)
    P, N, L = config.mamba_head_dim, config.mamba_d_state, min(SSD_CHUNK, length)
    return config.mamba_num_heads * (4 * P * N + 2 * L * N + 2 * L * P)
