"""What one device holds beside the cache: its share of the weights, and an estimate of what a step works in."""

from hylo.checkpoint import check_dtype
from hylo.errors import HyloError
from hylo.geometry import geometry_in, mamba_channels
from hylo.modeling.configuration import HyloConfig
from hylo.serve.pages import Pages, Platform
from hylo.serve.supported import cached_width, served_rank

VOCABULARY_STEP = 64  # vLLM pads the vocabulary to a multiple
DELTA_CHUNK, SSD_CHUNK = 64, 256  # tokens for which a prefill kernel keeps one state
CONTEXT_ROWS = 64 * 1024  # cached tokens that vLLM's MLA prefill expands at once, at most


def weight_bytes(config: HyloConfig, dtype: str, tensor_parallel: int = 1) -> int:
    """Bytes of one device's weights.

    Norms, MLA's down-projections and rows of biases behind a sum are whole on every device, all else is cut; MLA's
    up-projection is repeated to every query head, and latents with a rank of their own are padded to the largest.
    """
    cut, whole = 0, config.hidden_size
    for mixer in config.mixers:
        mixer_cut, mixer_whole = _mixer_weights(config, mixer, tensor_parallel)
        cut += mixer_cut + 3 * config.hidden_size * config.intermediate_size
        whole += mixer_whole + 2 * config.hidden_size
        if config.mlp_bias:
            cut, whole = cut + 2 * config.intermediate_size, whole + config.hidden_size
    vocabulary = padded_vocabulary(config)
    if vocabulary % tensor_parallel:
        raise HyloError(f"the vocabulary, padded to {vocabulary:,}, cannot be shared by {tensor_parallel} devices")
    cut += (1 if config.tie_word_embeddings else 2) * vocabulary * config.hidden_size
    return (cut // tensor_parallel + whole) * check_dtype(dtype).itemsize


def padded_vocabulary(config: HyloConfig) -> int:
    return -(-config.vocab_size // VOCABULARY_STEP) * VOCABULARY_STEP


def _mixer_weights(config: HyloConfig, mixer: str, tensor_parallel: int) -> tuple[int, int]:
    """Values that are cut and values that are whole on each of the devices."""
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    bias, norms = int(config.qkv_bias), head_dim * config.qk_norm
    if mixer == "attention":
        kv_heads = max(config.num_key_value_heads, tensor_parallel)  # repeated where there are more devices
        rows = (heads + 2 * kv_heads) * head_dim
        return rows * (hidden + bias) + hidden * heads * head_dim, 2 * norms
    if mixer == "mla":
        rank, latent = served_rank(config), cached_width(config)
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        outputs = hidden * heads * config.v_head_dim * (1 + config.attention_gate)
        cut = heads * head_dim * (config.q_lora_rank + bias) + up * (rank + bias) + outputs
        return cut, config.q_lora_rank * hidden + latent * (hidden + bias) + norms
    taps = config.conv_kernel_size
    if mixer == "gated_deltanet":
        key = config.gdn_num_heads * config.gdn_head_dim
        value = key * config.gdn_expand_v
        projections = hidden * (2 * key + 3 * value + 2 * config.gdn_num_heads)
        biases = bias * (2 * key + 2 * value)  # the gate's is zero, and there because vLLM stacks it on q, k and v
        cut = projections + 2 * config.gdn_num_heads + taps * (2 * key + value) + biases
        return cut, config.gdn_head_dim * config.gdn_expand_v
    if mixer == "kda":
        width, heads = config.kda_head_dim, config.kda_num_heads
        inner = heads * width
        biases = bias * (3 * inner + heads)  # b's is zero, and there because vLLM stacks it on q, k and v, as f_a's
        cut = hidden * (4 * inner + heads) + 2 * width * inner + inner + heads + 3 * taps * inner + biases
        return cut, 2 * hidden * width + width + bias * width
    channels = mamba_channels(geometry_in(config))
    in_proj = (hidden + bias) * (config.mamba_d_inner + channels + config.mamba_num_heads)
    scalars = 3 * config.mamba_num_heads + config.mamba_d_inner  # A_log, D, dt_bias; the norm over each head's group
    return in_proj + (taps + 1) * channels + scalars + hidden * config.mamba_d_inner, 0


def batch(platform: Platform, memory_bytes: int | None, tensor_parallel: int, max_model_len: int) -> tuple[int, int]:
    """Tokens and sequences of a step, as `vllm serve` sets them where nothing is asked for (A100: as below 70 GiB)."""
    if platform == "cpu":
        tokens, sequences = 2048 * tensor_parallel, 128 * tensor_parallel
    elif memory_bytes is not None and memory_bytes >= 160 * 2**30:
        tokens, sequences = 16384, 1024
    elif memory_bytes is not None and memory_bytes >= 70 * 2**30:
        tokens, sequences = 8192, 1024
    else:
        tokens, sequences = 2048, 256
    tokens = min(tokens, sequences * max_model_len)
    return tokens, min(sequences, tokens)


def workspace_bytes(
    config: HyloConfig,
    dtype: str,
    pages: Pages,
    tokens: int,
    sequences: int,
    max_model_len: int,
    tensor_parallel: int = 1,
    platform: Platform = "cuda",
) -> int:
    """An estimate, from shapes, of what a step of so many tokens and sequences works in; vLLM measures its own.

    activations: tokens x (4 hidden + the widest sublayer's inputs and outputs), the chunk states of prefill included
    MLA's context on GPUs: rows x (latent + keys, up-projected keys and values of every head), rows = what vLLM
        expands at once, min(max(8 max_model_len, 4 sequences x block), 65,536) in whole blocks
    logits: sequences x vocabulary, in `dtype` and twice in float32
    """
    itemsize = check_dtype(dtype).itemsize
    widest = max(_widths(config, mixer) for mixer in {*config.mixers, "mlp"}) // tensor_parallel
    total = tokens * (4 * config.hidden_size + widest) * itemsize
    if "mla" in config.mixers and platform == "cuda":
        rows = min(max(8 * max_model_len, 4 * sequences * pages.block_size), CONTEXT_ROWS)
        rows = -(-rows // pages.block_size) * pages.block_size
        head = config.head_dim + config.qk_nope_head_dim + config.v_head_dim
        total += rows * (cached_width(config) + head * config.num_attention_heads // tensor_parallel) * itemsize
    return total + sequences * padded_vocabulary(config) * (itemsize + 8)


def _widths(config: HyloConfig, mixer: str) -> int:
    """Values per token that a sublayer has at once, in all of its heads."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    if mixer == "mlp":
        return 3 * config.intermediate_size
    if mixer == "attention":
        return 2 * (heads + config.num_key_value_heads) * head_dim
    if mixer == "mla":
        per_head = 2 * head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim  # q, k, [k, v], o
        return config.q_lora_rank + cached_width(config) + heads * per_head
    if mixer == "gated_deltanet":
        key = config.gdn_num_heads * config.gdn_head_dim
        value = key * config.gdn_expand_v
        states = value * config.gdn_head_dim // DELTA_CHUNK
        return 2 * (2 * key + value) + 2 * value + key + 2 * value + states  # q k v | gate, o | what chunks write
    if mixer == "kda":
        inner = config.kda_num_heads * config.kda_head_dim
        # q k v twice | the decay, and its sum in float32 | gate, o | what chunks write
        return 6 * inner + 3 * inner + 2 * inner + inner * config.kda_head_dim // DELTA_CHUNK
    states = 2 * config.mamba_d_inner * config.mamba_d_state // SSD_CHUNK  # in float32
    return (
        2 * mamba_channels(geometry_in(config)) + 5 * config.mamba_d_inner + states
    )  # x B C twice | z, x and B in every head, y, o
