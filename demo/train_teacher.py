"""Trains the demo's base checkpoint: a 1.8M-parameter Llama with its own tokenizer, on two CPU cores in about an hour.

    python demo/train_teacher.py --out demo/teacher

Text is the Python standard library of the interpreter that runs this (its test suite too, which is never held out), plus
synthetic retrieval. Rows of one random segment repeated over and over make induction heads form within minutes; facts
scattered in text turn them into retrieval; the last stages stretch the context to 2048 tokens. Resumes from OUT/state.pt.
"""

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo.data.retrieval import KEYS, VALUES, FactFormat, fact_row, needle_row, window
from hylo.data.sources import standard_library, token_stream

# name, steps, rows, length, facts a row, restatements of each, share of rows that repeat one segment
STAGES = [
    ("induction", 1300, 48, 128, 2, 4, 0.5),
    ("facts", 1600, 32, 256, 6, 3, 0.15),
    ("longer", 450, 8, 1024, 16, 4, 0.05),
    ("long", 800, 4, 2048, 24, 4, 0.05),
]
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
        vocab_size=2560, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
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


def make_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=384,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=4,
        )
    )


def batch(rng, stream, facts, vocabulary, rows, length, n, repeats, repeated):
    """ids, next-token weights for text, next-token mask for what the context determines: all (rows, length + 1)."""
    ids, text, answer = [], [], []
    for _ in range(rows):
        if rng.random() < repeated:
            period = int(rng.integers(4, max(5, min(96, length // 3))))
            segment = rng.integers(5, vocabulary, period) if rng.random() < 0.5 else window(rng, stream, period)
            ids.append(np.resize(segment, length + 1))
            text.append(np.zeros(length + 1, bool))
            answer.append(np.arange(length + 1) > period)
        else:
            row = fact_row(rng, stream, length + 1, facts, n, repeats)
            ids.append(row.ids)
            text.append(~row.first & ~row.answer)
            answer.append(row.answer)
    return (torch.from_numpy(np.stack(x)) for x in (ids, text, answer))


def learning_rate(step: int, steps: int) -> float:
    if step < WARM_UP:
        return PEAK_LR * (step + 1) / WARM_UP
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP))))


@torch.no_grad()
def needle_accuracy(model, stream, facts, length, answers=256, n=8) -> float:
    rng, right, asked = np.random.default_rng(11), 0, 0
    while asked < answers:
        row = needle_row(rng, stream, length, facts, n, first_bin=asked // n)
        guess = model(torch.from_numpy(row.ids)[None]).logits[0].argmax(-1).numpy()
        right += sum(bool((guess[a - 1 : b - 1] == row.ids[a:b]).all()) for a, b in row.spans)
        asked += n
    return right / asked


@torch.no_grad()
def bits_per_byte(model, tokenizer, documents, length=2048, stride=1024) -> float:
    """Every held-out byte is scored once, with at least `stride` tokens of context where the document has them."""
    bits, size = 0.0, 0
    for document in documents:
        size += len(document.encode())
        ids = [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)]
        for end in range(min(length, len(ids)), len(ids) + stride, stride):
            end = min(end, len(ids))
            start = max(0, end - length)
            new = min(end - start - 1, stride if start else length) if end == len(ids) or start else end - start - 1
            x = torch.tensor(ids[start:end])[None]
            loss = F.cross_entropy(model(x[:, :-1]).logits[0], x[0, 1:], reduction="none")
            bits += loss[-new:].sum().item() / math.log(2)
            if end == len(ids):
                break
    return bits / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = standard_library(held_out=False)
    held_out = standard_library(held_out=True)
    tests = [p.read_text(encoding="utf-8", errors="replace") for p in sorted((library / "test").rglob("*.py"))]
    if not (args.out / "tokenizer.json").exists():
        make_tokenizer(documents).save_pretrained(args.out)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    facts = FactFormat.of(tokenizer)
    stream = token_stream(tokenizer, [*documents, *documents, *tests])  # the library itself counts twice
    val = token_stream(tokenizer, held_out)
    print(f"{len(stream):,} training tokens, {len(val):,} held out, longest fact {facts.longest} tokens", flush=True)

    model = make_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decay = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=PEAK_LR, betas=(0.9, 0.98)
    )
    total, done, state = sum(s[1] for s in STAGES), 0, args.out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    began, tokens, step = time.time(), 0, 0
    for name, steps, rows, length, n, repeats, repeated in STAGES:
        for _ in range(steps):
            step += 1
            if step <= done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total)
            rng = np.random.default_rng((args.seed, step))
            ids, text, answer = batch(rng, stream, facts, len(tokenizer), rows, length, n, repeats, repeated)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(ids[:, 1:])
            text, answer = text[:, 1:], answer[:, 1:]
            loss_text = loss[text].sum() / text.sum().clamp(min=1)
            loss_answer = loss[answer].sum() / answer.sum().clamp(min=1)
            (loss_text + loss_answer).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += rows * length
            if step % 50 == 0:
                speed = tokens / (time.time() - began)
                print(
                    f"{name} {step}/{total} text {loss_text:.3f} answers {loss_answer:.3f} {speed:.0f} tok/s "
                    f"{time.time() - began:.0f} s",
                    flush=True,
                )
            if step % 500 == 0 or step == total:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(saved, state.with_suffix(".tmp"))
                state.with_suffix(".tmp").replace(state)
                print({t: needle_accuracy(model, val, facts, t) for t in (256, 1024, 2048) if t <= 2 * length}, flush=True)

    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    result = {
        "needle": {t: needle_accuracy(model, val, facts, t) for t in (256, 512, 1024, 2048)},
        "bits_per_byte": bits_per_byte(model, tokenizer, held_out),
        "steps": total,
        "seed": args.seed,
    }
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
