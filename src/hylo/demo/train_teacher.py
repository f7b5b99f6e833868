"""Trains the demo's base checkpoint: a 1.8M-parameter Llama with its own tokenizer, on two CPU cores.

    python -m hylo.demo.train_teacher --out DIR                # about forty minutes on two free cores
    python -m hylo.demo.train_teacher --grow DIR --out LARGER  # a teacher of 5.2M parameters, grown from that one
    python -m hylo.demo.train_teacher --check DIR              # needle accuracy, and bits per byte beside xz -9e

Text is the Python standard library of the interpreter that runs this (with its test suite, which is never held out),
plus synthetic retrieval. Training starts from a seeded induction circuit (`seed_induction`); facts scattered in text,
and rows of one segment repeated over and over, turn it into retrieval; the last stages stretch the context to 2048.
Stopped, it resumes from OUT/state.pt.
"""

import argparse
import json
import lzma
import math
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo.data.retrieval import KEYS, VALUES, FactFormat, fact_row, window
from hylo.data.sources import standard_library, token_stream
from hylo.evaluate.forward import Scorer
from hylo.evaluate.needle import needle_rows, needle_score


class Stage(NamedTuple):
    name: str
    steps: int
    rows: int
    length: int
    facts: int  # in a row
    restatements: int  # of each fact
    repeated: float  # share of rows that repeat one segment


STAGES = [
    Stage("short", 200, 64, 128, 2, 4, 0.15),
    Stage("facts", 700, 32, 256, 6, 3, 0.1),
    Stage("longer", 160, 8, 1024, 16, 4, 0.05),
    Stage("long", 320, 4, 2048, 24, 4, 0.05),
]
GROWN_STAGES = [
    Stage("facts", 900, 32, 256, 6, 3, 0.05),
    Stage("longer", 200, 8, 1024, 16, 4, 0.05),
    Stage("long", 300, 4, 2048, 24, 4, 0.05),
]
GROWN_LAYERS, GROWN_MLP = 10, 1024
VOCABULARY = 2560
THETA = 500000.0
PEAK_LR, WARM_UP = 2e-3, 100
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the words of the retrieval task are repeated often enough to become tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = "\n".join(f"# remember {word}" for word in KEYS + VALUES)
    tokenizer.train_from_iterator(documents + [words] * 3000, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|end|>",
        chat_template=CHAT,
        model_max_length=2048,
    )


def make_model() -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=384,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=4,
        )
    )
    seed_induction(model)
    return model


@torch.no_grad()
def seed_induction(model: LlamaForCausalLM, constant: float = 0.15, spread: float = 0.05) -> None:
    """Starts training from a two-layer induction circuit, which would otherwise take most of the budget to appear.

    Head 0 of layer 0 attends to the previous token and writes what it is into a subspace of its own; head 0 of layer 1
    matches the current token against that subspace and copies the token found. All else is random and small.
    """
    config, width, pairs = model.config, model.config.head_dim, model.config.head_dim // 2
    hidden = config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = 0.05 if "o_proj" in name or "down_proj" in name else 1.0
            parameter.normal_(std=spread if "embed" in name else scale * parameter.shape[1] ** -0.5)
    model.model.embed_tokens.weight[:, 0] = constant  # a channel that does not depend on the token
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    content = torch.linalg.qr(torch.randn(hidden, width)).Q.T  # what head 0 reads of a token
    content[:, 0] = 0
    written = torch.linalg.qr(torch.randn(hidden, width)).Q  # where head 0 writes it
    copied = torch.linalg.qr(torch.randn(hidden, width)).Q.T
    copied[:, 0] = 0

    frequency = THETA ** (-torch.arange(pairs) / pairs)
    fast = (torch.arange(pairs) < 10).float()
    normed = constant / ((constant**2 + spread**2 * (hidden - 1)) / hidden) ** 0.5  # the channel after RMSNorm
    gain = (60.0 * width**0.5 / fast.sum()) ** 0.5 / normed
    for projection in (first.q_proj, first.k_proj):
        projection.weight[:width] = 0
    first.q_proj.weight[:pairs, 0] = gain * fast
    first.k_proj.weight[:pairs, 0] = gain * fast * frequency.cos()  # turned by one step: highest one token back
    first.k_proj.weight[pairs:width, 0] = gain * fast * frequency.sin()
    first.v_proj.weight[:width] = content
    first.o_proj.weight[:, :width] = 0.12 * written

    slow = torch.arange(20, pairs)
    slow = torch.cat((slow, slow + pairs))  # content must match at any distance
    gain = (20.0 * width**0.5 / len(slow)) ** 0.5
    for projection in (second.q_proj, second.k_proj):
        projection.weight[:width] = 0
    second.q_proj.weight[slow] = gain * content[: len(slow)]
    second.k_proj.weight[slow] = gain * written[:, : len(slow)].T
    second.v_proj.weight[:width] = copied
    second.o_proj.weight[:, :width] = 0.12 * copied.T


@torch.no_grad()
def grow(model: LlamaForCausalLM, layers: int = GROWN_LAYERS, mlp: int = GROWN_MLP) -> LlamaForCausalLM:
    """A deeper and wider model that computes what `model` does (Net2Net, arXiv 1511.05641), to be trained on.

    What is new writes nothing yet: output projections of added layers and added columns of the MLPs' are zero.
    """
    config = LlamaConfig(**(model.config.to_dict() | {"num_hidden_layers": layers, "intermediate_size": mlp}))
    grown = LlamaForCausalLM(config)
    old = model.state_dict()
    for name, tensor in grown.state_dict().items():
        if tensor.ndim == 2:
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensor.normal_(std=0.0 if silent else tensor.shape[1] ** -0.5)
        if name in old:
            tensor[tuple(slice(size) for size in old[name].shape)] = old[name]
    return grown


def batch(
    rng: np.random.Generator, stream: np.ndarray, facts: FactFormat, stage: Stage
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, which of them are plain text, and which the context determines: all (rows, length + 1)."""
    ids, text, answer = [], [], []
    length = stage.length
    for _ in range(stage.rows):
        if rng.random() < stage.repeated:
            period = int(rng.integers(4, max(5, min(96, length // 3))))
            segment = rng.integers(5, VOCABULARY, period) if rng.random() < 0.5 else window(rng, stream, period)
            ids.append(np.resize(segment, length + 1))
            text.append(np.zeros(length + 1, bool))
            answer.append(np.arange(length + 1) > period)
        else:
            row = fact_row(rng, stream, length + 1, facts, stage.facts, stage.restatements)
            ids.append(row.ids)
            text.append(~row.first & ~row.answer)
            answer.append(row.answer)
    return tuple(torch.from_numpy(np.stack(x)) for x in (ids, text, answer))  # type: ignore[return-value]


def losses(
    model: LlamaForCausalLM, ids: torch.Tensor, text: torch.Tensor, answer: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token losses over plain text and over what the context determines."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    def mean(mask: torch.Tensor) -> torch.Tensor:
        chosen = mask[:, 1:].flatten()
        return (loss * chosen).sum() / chosen.sum().clamp(min=1)

    return mean(text), mean(answer)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to a twentieth of the peak."""
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP))))


def needle_accuracy(model: LlamaForCausalLM, stream: np.ndarray, facts: FactFormat, length: int) -> float:
    return needle_score(Scorer(model), needle_rows(stream, length, facts, answers=256, needles=8, seed=0)).accuracy


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    length: int = 2048,
    stride: int = 1024,
) -> float:
    """Every byte of every document is scored once, with `length - stride` tokens of context or more where there are."""
    bits, size = 0.0, 0
    for document in documents:
        size += len(document.encode())
        ids = [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False, verbose=False)]
        scored = 1
        while scored < len(ids):
            end = min(len(ids), length if scored == 1 else scored + stride)
            x = torch.tensor(ids[max(0, end - length) : end])[None]
            loss = F.cross_entropy(model(x[:, :-1]).logits[0], x[0, 1:], reduction="none")
            bits += loss[-(end - scored) :].sum().item() / math.log(2)
            scored = end
    return bits / size


def xz_bits_per_byte(documents: list[str]) -> float:
    """What `xz -9e` needs for the same documents in one file."""
    text = "".join(documents).encode()
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def check(directory: Path) -> dict[str, Any]:
    """Needle accuracy by length (256 answers each), and bits per byte of held-out text beside those of xz -9e."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    documents = standard_library(held_out=True)
    facts, stream = FactFormat.of(tokenizer), token_stream(tokenizer, documents)
    return {
        "needle": {t: needle_accuracy(model, stream, facts, t) for t in (256, 512, 1024, 2048)},
        "bits_per_byte": bits_per_byte(model, tokenizer, documents),
        "xz_bits_per_byte": xz_bits_per_byte(documents),
        "held_out_bytes": sum(len(document.encode()) for document in documents),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="directory to train in")
    task.add_argument("--check", type=Path, metavar="DIR", help="directory to measure")
    parser.add_argument("--grow", type=Path, metavar="DIR", help="with --out: grow this model instead of a new one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        print(json.dumps(check(args.check), indent=1))
        return
    train(args.out, args.seed, args.grow)


def train(out: Path, seed: int, small: Path | None = None) -> None:
    """Trains a new model in `out`, or one that is grown from `small` and keeps its tokenizer."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = standard_library(held_out=False)
    held_out = standard_library(held_out=True)
    tests = [p.read_text(encoding="utf-8", errors="replace") for p in sorted((library / "test").rglob("*.py"))]
    if not (out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(small) if small else make_tokenizer(documents)
        tokenizer.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    facts = FactFormat.of(tokenizer)
    stream = token_stream(tokenizer, [*documents, *documents, *tests])  # the library itself counts twice
    val = token_stream(tokenizer, held_out)
    print(f"{len(stream):,} training tokens, {len(val):,} held out, longest fact {facts.longest} tokens", flush=True)

    model = grow(LlamaForCausalLM.from_pretrained(small, dtype=torch.float32)) if small else make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    steps = [stage for stage in (GROWN_STAGES if small else STAGES) for _ in range(stage.steps)]
    done, state = 0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    began, tokens = time.time(), 0
    for step, stage in enumerate(steps[done:], start=done + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(steps))
        text_loss, answer_loss = losses(model, *batch(np.random.default_rng((seed, step)), stream, facts, stage))
        (text_loss + answer_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += stage.rows * stage.length
        if step % 50 == 0:
            speed = tokens / (time.time() - began)
            figures = f"text {text_loss:.3f} answers {answer_loss:.3f} {speed:.0f} tokens/s"
            print(f"{stage.name} {step}/{len(steps)} {figures}", flush=True)
        if step % 200 == 0 or step == len(steps):
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, out / "state.tmp"
            )
            (out / "state.tmp").replace(state)
            accuracy = {t: needle_accuracy(model, val, facts, t) for t in (256, 1024, 2048) if t <= 2 * stage.length}
            print(f"needle accuracy {accuracy}", flush=True)
            model.train()

    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(out)
    state.unlink()
    print(json.dumps(check(out), indent=1))


if __name__ == "__main__":
    main()
