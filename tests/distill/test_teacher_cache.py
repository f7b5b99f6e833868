"""The exact teacher cache: it trains as a live teacher does, goes on where it stopped, and is not trusted blindly."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, PreTrainedModel
from window_rows import WindowRows

from hylo.distill import cache_writer
from hylo.distill.cache import TeacherCache, file_hash
from hylo.distill.cache_writer import CacheSettings, TeacherOfRows, write_teacher_cache
from hylo.distill.extend import extend, extend_from_cache
from hylo.distill.objectives import CachedDistillation, LongDistillation, TeacherStates
from hylo.distill.settings import Training
from hylo.distill.student import freeze_head, read_head
from hylo.distill.trainer import Rows
from hylo.errors import HyloError
from hylo.modeling import HyloForCausalLM
from hylo.modeling.loading import load_model

MakeTraining = Callable[..., Training]
Write = Callable[..., Path]
LENGTH, ROWS, STEPS = 16, 4, 6
ORDER = {"data": ["rows"], "length": LENGTH, "rows": ROWS, "tokens": STEPS * ROWS * LENGTH}
TOKEN_BYTES = 32 * 4 + 4 + 4
SHARD = 5 * LENGTH * TOKEN_BYTES  # five rows, so that shards and steps do not end together
QUIET = Console(quiet=True)


@pytest.fixture
def write(base_directory: Path, student_directory: Path, rows: Rows) -> Write:
    """Writes a cache of six steps of four rows in five shards."""

    def make(out: Path, *, teacher: Path = base_directory, rows: Rows = rows, **changes: Any) -> Path:
        settings = CacheSettings.model_validate(ORDER | changes)
        write_teacher_cache(teacher, student_directory, out, rows, settings, QUIET, SHARD)
        return out

    return make


@pytest.fixture
def cache(write: Write, tmp_path: Path) -> Path:
    return write(tmp_path / "cache")


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def of_cache(training: MakeTraining, **changes: Any) -> Training:
    values = {"length": LENGTH, "rows": ROWS, "tokens": ORDER["tokens"], "learning_rate": 1e-3, "weight_decay": 0.1}
    values |= {"trains": "all_but_head", "save_every": 50}
    return training(**values | changes)


def test_holds_the_rows_and_what_the_teacher_says_of_them(
    cache: Path, base: LlamaForCausalLM, student_directory: Path, rows: Rows
) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    assert sorted(path.name for path in cache.iterdir()) == [
        "manifest.json",
        *(f"rows-0000{i}.safetensors" for i in range(5)),
    ]
    assert manifest["complete"] and manifest["version"] == 2 and manifest["recipe"]["temperature"] == 1.0
    assert all(file_hash(cache / shard["file"]) == shard["sha256"] for shard in manifest["shards"])
    head = read_head(student_directory).double()
    dataset = TeacherCache(cache).dataset(LENGTH, 24)
    assert len(dataset) == 24
    for i in (0, 4, 5, 23):
        ids = rows(LENGTH, 24)[i]["input_ids"]
        with torch.no_grad():
            log_p = torch.log_softmax(base.double()(ids[None]).logits[0], -1)
        assert torch.equal(dataset[i]["input_ids"], ids)
        assert dataset[i]["vectors"].dtype == dataset[i]["neg_entropy"].dtype == torch.float32
        torch.testing.assert_close(dataset[i]["vectors"].double(), log_p.exp() @ head, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            dataset[i]["neg_entropy"].double(), (log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5
        )


def test_packed_documents_are_kept_apart(
    write: Write, base: LlamaForCausalLM, rows: Rows, student_directory: Path, tmp_path: Path
) -> None:
    """Every row is two documents; the teacher reads them as if each were alone, and a batch says where they begin."""

    class Packed(Dataset[dict[str, Tensor]]):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            positions = torch.cat((torch.arange(5), torch.arange(LENGTH - 5)))
            return rows(LENGTH, 24)[index] | {"position_ids": positions}

    cache = TeacherCache(write(tmp_path / "packed", rows=lambda length, count: Packed()))
    assert cache.recipe.packed and cache.recipe.token_bytes == TOKEN_BYTES + 4
    cache.verify(lambda length, count: Packed())
    row, head = cache.dataset(LENGTH, 24)[7], read_head(student_directory)
    assert torch.equal(row["position_ids"], Packed()[7]["position_ids"]) and row["position_ids"].dtype == torch.int64
    with torch.no_grad():
        log_p = [torch.log_softmax(base(ids[None]).logits[0], -1) for ids in row["input_ids"].split((5, LENGTH - 5))]
    torch.testing.assert_close(row["vectors"], torch.cat(log_p).exp() @ head, rtol=1e-4, atol=1e-4)
    with pytest.raises(HyloError, match=r"other rows than teacher cache .*packed was made of"):
        cache.verify(rows)


def test_losses_and_gradients_are_those_of_the_live_teacher(
    cache: Path, base: LlamaForCausalLM, build_student: Any, student_directory: Path
) -> None:
    rows = [TeacherCache(cache).dataset(LENGTH, 4)[i] for i in range(4)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    students = []
    for _ in range(2):
        students.append(build_student(base, ["gated_deltanet", "mla", "attention"]))
        freeze_head(students[-1], read_head(student_directory))
    with torch.no_grad():
        hidden = base.model(batch["input_ids"]).last_hidden_state
    live = LongDistillation(students[0])(batch, TeacherStates(hidden, base.lm_head.weight))
    cached = CachedDistillation(students[1])(batch)
    assert cached.item() == pytest.approx(live.item(), rel=1e-5)
    live.backward()
    cached.backward()
    theirs = dict(students[0].named_parameters())
    for name, parameter in students[1].named_parameters():
        if name == "lm_head.weight":
            assert parameter.grad is theirs[name].grad is None
            continue
        difference = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-5, (name, difference)


def test_a_run_from_the_cache_is_the_live_run_with_a_frozen_head(
    cache: Path, base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    settings = of_cache(training)
    extend_from_cache(student_directory, cache, tmp_path / "cached", settings, 8, rows, QUIET)
    extend(student_directory, base_directory, tmp_path / "live", rows, settings, 8, QUIET)
    cached, live = steps_of(tmp_path / "cached"), steps_of(tmp_path / "live")
    assert [step["loss"] for step in cached] == pytest.approx([step["loss"] for step in live], rel=1e-5)
    assert live[-1]["loss"] < live[0]["loss"]
    ours, theirs = load_model(tmp_path / "cached").state_dict(), load_model(tmp_path / "live").state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-4)


def test_a_tied_head_is_untied_and_frozen(
    cache: Path, student_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    assert load_model(student_directory).config.tie_word_embeddings
    out = tmp_path / "out"
    extend_from_cache(student_directory, cache, out, of_cache(training), 8, console=QUIET)
    config, weights = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert not config.get("tie_word_embeddings", False) and config["max_position_embeddings"] == LENGTH
    assert torch.equal(weights["lm_head.weight"], read_head(student_directory))
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    after = load_model(out)
    assert torch.equal(after.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(after.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    extend_from_cache(out, cache, tmp_path / "again", of_cache(training), 8, console=QUIET)  # the head is still the one


def test_a_teacher_of_another_width_and_part_of_the_rows(
    build_base: Callable[..., LlamaForCausalLM],
    student_directory: Path,
    tmp_path: Path,
    write: Write,
    rows: Rows,
    training: MakeTraining,
) -> None:
    build_base(hidden_size=48).save_pretrained(tmp_path / "wide")
    cache = write(tmp_path / "cache", teacher=tmp_path / "wide")
    part = of_cache(training, tokens=3 * ROWS * LENGTH)
    extend_from_cache(student_directory, cache, tmp_path / "out", part, 8, console=QUIET)
    extend(student_directory, tmp_path / "wide", tmp_path / "live", rows, part, 8, QUIET)
    losses, live = ([step["loss"] for step in steps_of(tmp_path / name)] for name in ("out", "live"))
    assert len(losses) == 3 and losses == pytest.approx(live, rel=1e-5)


def test_bf16_vectors_take_half_the_place_and_keep_float32_entropies(
    write: Write, tmp_path: Path, student_directory: Path, training: MakeTraining
) -> None:
    exact, narrow = write(tmp_path / "float32"), write(tmp_path / "bf16", dtype="bfloat16")
    with safe_open(narrow / "rows-00000.safetensors", "pt") as file:
        assert file.get_slice("vectors").get_dtype() == "BF16" and file.get_slice("neg_entropy").get_dtype() == "F32"
    bytes_of = [sum(path.stat().st_size for path in cache.glob("*.safetensors")) for cache in (exact, narrow)]
    assert bytes_of[0] - bytes_of[1] == pytest.approx(ORDER["tokens"] * 32 * 2, abs=1000)
    assert bytes_of[0] == pytest.approx(ORDER["tokens"] * TOKEN_BYTES, abs=3000)
    for cache in (exact, narrow):
        extend_from_cache(student_directory, cache, cache.with_suffix(".out"), of_cache(training), 8, console=QUIET)
    a, b = ([step["loss"] for step in steps_of(cache.with_suffix(".out"))] for cache in (exact, narrow))
    assert a != b and a == pytest.approx(b, abs=0.01)


def test_a_teacher_in_bf16_is_the_live_one_in_bf16(
    write: Write, base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows, training: MakeTraining
) -> None:
    cache, settings = write(tmp_path / "cache", precision="bf16"), of_cache(training, precision="bf16")
    extend_from_cache(student_directory, cache, tmp_path / "cached", settings, 8, console=QUIET)
    extend(student_directory, base_directory, tmp_path / "live", rows, settings, 8, QUIET)
    cached, live = (steps_of(tmp_path / name)[0]["loss"] for name in ("cached", "live"))
    assert cached == pytest.approx(live, abs=3e-3)


class Killed(BaseException):
    pass


@pytest.fixture
def teacher_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the teacher's batches; the one whose number is put into the list first dies in it."""
    calls = [0, -1]
    call = TeacherOfRows.__call__

    def counted(self: TeacherOfRows, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Killed
        return call(self, batch)

    monkeypatch.setattr(TeacherOfRows, "__call__", counted)
    return calls


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def test_goes_on_after_the_last_whole_shard(write: Write, tmp_path: Path, teacher_calls: list[int]) -> None:
    whole = write(tmp_path / "whole")
    assert teacher_calls[0] == 5
    teacher_calls[:] = [0, 4]
    with pytest.raises(Killed):
        write(tmp_path / "cache")
    partial = tmp_path / "cache.partial"
    assert not (tmp_path / "cache").exists() and len(list(partial.glob("rows-*"))) == 3
    # What a kill can leave: half a shard aside, a shard that is not noted, a note that was cut off.
    (partial / ".rows-00003.safetensors.aside").write_bytes(b"half")
    (partial / "rows-00003.safetensors").write_bytes(b"half")
    with (partial / "shards.jsonl").open("a") as journal:
        journal.write('{"file": "rows-000')
    teacher_calls[:] = [0, -1]
    write(tmp_path / "cache")
    assert teacher_calls[0] == 2 and not partial.exists() and same_files(tmp_path / "cache", whole)


def test_a_part_that_was_damaged_since_is_written_again(write: Write, tmp_path: Path, teacher_calls: list[int]) -> None:
    whole = write(tmp_path / "whole")
    teacher_calls[:] = [0, 5]
    with pytest.raises(Killed):
        write(tmp_path / "cache")
    partial = tmp_path / "cache.partial"
    flip(partial / "rows-00001.safetensors")
    (partial / "rows-00002.safetensors").unlink()
    teacher_calls[:] = [0, -1]
    write(tmp_path / "cache")
    assert teacher_calls[0] == 3 and same_files(tmp_path / "cache", whole)


def test_a_run_killed_before_the_last_rename_needs_no_teacher(
    write: Write, tmp_path: Path, teacher_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(cache_writer.os, "rename", lambda a, b: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            write(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    teacher_calls[:] = [0, -1]
    write(tmp_path / "cache")
    assert teacher_calls[0] == 0
    TeacherCache(tmp_path / "cache").verify()


def test_a_part_of_something_else_is_refused(
    write: Write, tmp_path: Path, teacher_calls: list[int], build_base: Callable[..., LlamaForCausalLM]
) -> None:
    teacher_calls[:] = [0, 3]
    with pytest.raises(Killed):
        write(tmp_path / "cache")
    before = {path: path.read_bytes() for path in (tmp_path / "cache.partial").iterdir()}
    build_base(rms_norm_eps=1e-3).save_pretrained(tmp_path / "other")
    stream = np.random.default_rng(1).integers(0, 64, 4000).astype(np.int32)
    for match, changes in (
        ("vectors float32, not bfloat16", {"dtype": "bfloat16"}),
        (r"count 24, not 48", {"tokens": 2 * ORDER["tokens"]}),
        ("seed 0, not 1", {"seed": 1}),
        ("facts 0.0, not 0.5", {"facts": 0.5}),
        ("precision float32, not bf16", {"precision": "bf16"}),
        ("another teacher", {"teacher": tmp_path / "other"}),
        ("the text gives other rows", {"rows": lambda length, count: WindowRows(stream, length, count, seed=0)}),
    ):
        with pytest.raises(HyloError, match=rf"cache\.partial .*{match}|{match}.*cache\.partial"):
            write(tmp_path / "cache", **changes)
    assert before == {path: path.read_bytes() for path in (tmp_path / "cache.partial").iterdir()}
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes.txt").write_text("")
    with pytest.raises(HyloError, match="new.partial exists and holds no part of a cache"):
        write(tmp_path / "new")


def test_a_full_disk_keeps_what_is_there(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = cache_writer.os.fsync

    def full(file: int) -> None:
        if (tmp_path / "cache.partial" / ".rows-00002.safetensors.aside").exists():
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patched:
        patched.setattr(cache_writer.os, "fsync", full)
        with pytest.raises(HyloError, match="cache.partial: No space left on device; free space .* goes on"):
            write(tmp_path / "cache")
    names = sorted(path.name for path in (tmp_path / "cache.partial").iterdir())
    assert names == ["manifest.json", "rows-00000.safetensors", "rows-00001.safetensors", "shards.jsonl"]
    write(tmp_path / "cache")
    TeacherCache(tmp_path / "cache").verify()


def test_says_what_it_will_take_before_it_starts(
    base_directory: Path, student_directory: Path, tmp_path: Path, rows: Rows
) -> None:
    written = io.StringIO()
    settings = CacheSettings.model_validate(ORDER)
    console = Console(file=written, width=300)
    write_teacher_cache(base_directory, student_directory, tmp_path / "cache", rows, settings, console, SHARD)
    lines = written.getvalue().splitlines()
    assert f"384 tokens of {TOKEN_BYTES} bytes each, 51.0 KiB in all" in lines[0] and lines[0].endswith("shards: 5")
    assert lines[-1] == "teacher cache: 5 of 5 shards written"


def test_models_that_do_not_belong_together_are_refused(
    write: Write,
    base_directory: Path,
    student_directory: Path,
    tmp_path: Path,
    rows: Rows,
    build_base: Callable[..., LlamaForCausalLM],
) -> None:
    def fails(match: str, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match):
            write(tmp_path / "out", **changes)
        assert not list(tmp_path.glob("out*"))

    build_base(vocab_size=65).save_pretrained(tmp_path / "other")
    fails("vocabulary of 65", teacher=tmp_path / "other")
    fails("exceed the 64", length=65)
    fails("does not exist", teacher=tmp_path / "nowhere")
    with pytest.raises(HyloError, match="convert it first"):
        write_teacher_cache(base_directory, base_directory, tmp_path / "out", rows, CacheSettings.model_validate(ORDER))
    (tmp_path / "there").mkdir()
    with pytest.raises(HyloError, match="there exists already"):
        write(tmp_path / "there")


def test_a_teacher_that_is_not_finite_is_named(write: Write, base: LlamaForCausalLM, tmp_path: Path) -> None:
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    base.save_pretrained(tmp_path / "broken")
    with pytest.raises(HyloError, match=r"not finite: its model.layers.1.mlp.up_proj.weight holds nan"):
        write(tmp_path / "cache", teacher=tmp_path / "broken")
    assert not (tmp_path / "cache").exists()


def flip(path: Path) -> None:
    """One bit, where the values lie."""
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def edit(cache: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    change(manifest)
    (cache / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_caches_are_never_read(
    cache: Path, student_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    shard = "rows-00002.safetensors"
    damages: list[tuple[str, Callable[[Path], Any]]] = [
        ("rows-00002.safetensors is damaged", lambda c: flip(c / shard)),
        ("rows-00002.safetensors is missing", lambda c: (c / shard).unlink()),
        ("rows-00002.safetensors has 9 bytes", lambda c: (c / shard).write_bytes(b"truncated")),
        ("is damaged", lambda c: shutil.copyfile(c / "rows-00001.safetensors", c / shard)),
        ("is incomplete; call the same", lambda c: edit(c, lambda m: m.update(complete=False))),
        ("format version 1, and this hylo reads version 2", lambda c: edit(c, lambda m: m.update(version=1))),
        ("is of format None", lambda c: edit(c, lambda m: m.pop("format"))),
        (r"damaged \(recipe.width", lambda c: edit(c, lambda m: m["recipe"].update(width="wide"))),
        (r"damaged \(recipe.temperature", lambda c: edit(c, lambda m: m["recipe"].update(temperature=2.0))),
        (r"does not list its 5 shards", lambda c: edit(c, lambda m: m["shards"].pop())),
        (r"does not list its", lambda c: edit(c, lambda m: m["recipe"].update(count=10**15))),
        (r"names ../x.safetensors", lambda c: edit(c, lambda m: m["shards"][0].update(file="../x.safetensors"))),
        (r"names rows.pt; only safetensors", lambda c: edit(c, lambda m: m["shards"][0].update(file="rows.pt"))),
        ("manifest .* is not readable JSON", lambda c: (c / "manifest.json").write_text("{")),
        ("holds no manifest.json", lambda c: (c / "manifest.json").unlink()),
        ("holds .*'vectors'.*, not ", replace_shard),
    ]
    for i, (match, damage) in enumerate(damages):
        copy = tmp_path / f"copy-{i}"
        shutil.copytree(cache, copy)
        damage(copy)
        with pytest.raises(HyloError, match=match):
            extend_from_cache(student_directory, copy, tmp_path / "out", of_cache(training), 8, console=QUIET)
        assert not list(tmp_path.glob("*out*")), match


def replace_shard(cache: Path) -> None:
    """By one of another shape, with all that the manifest says of it."""
    path = cache / "rows-00000.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"vectors": tensors["vectors"][..., :8].contiguous()}, path)
    known = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    edit(cache, lambda manifest: manifest["shards"][0].update(known))


def test_what_is_no_cache_is_named(
    cache: Path, student_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "vectors.pt").write_bytes(b"\x80\x04")
    (tmp_path / "empty").mkdir()
    cache.rename(tmp_path / "half.partial")
    edit(tmp_path / "half.partial", lambda manifest: manifest.update(complete=False))
    for name, match in (
        ("pickled", r"pickled files \(vectors.pt\)"),
        ("empty", "holds no manifest.json"),
        ("nowhere", "nowhere does not exist"),
        ("half", "half is incomplete; call the same hylo teacher-cache command again"),
        ("half.partial", "half.partial is incomplete"),
        ("student/config.json", "is a file"),
    ):
        with pytest.raises(HyloError, match=match):
            extend_from_cache(student_directory, tmp_path / name, tmp_path / "out", of_cache(training), 8)


def test_another_head_tokenizer_order_or_length_is_refused(
    cache: Path,
    base: LlamaForCausalLM,
    build_student: Any,
    student_directory: Path,
    tmp_path: Path,
    training: MakeTraining,
    rows: Rows,
) -> None:
    def fails(match: str, student: Path = student_directory, rows: Rows | None = None, **changes: Any) -> None:
        with pytest.raises(HyloError, match=match):
            extend_from_cache(student, cache, tmp_path / "out", of_cache(training, **changes), 8, rows, QUIET)
        assert not list(tmp_path.glob("*out*"))

    fails("made with length 16, not 32", length=32)
    fails("holds 384 tokens, fewer than 448", tokens=448)
    stream = np.random.default_rng(0).integers(0, 64, 4000).astype(np.int32)
    fails("gives other rows .*from row 0 on", rows=lambda length, count: WindowRows(stream, length, count, seed=1))

    class OneRowDiffers(WindowRows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row = super().__getitem__(index)
            if index == 17:
                row["input_ids"][3] ^= 1
            return row

    fails("from row 15 on", rows=lambda length, count: OneRowDiffers(stream, length, count, seed=0))

    other: HyloForCausalLM = build_student(base, ["mla", "mla", "attention"])
    other.lm_head.weight.data[5, 5] += 1e-3
    other.save_pretrained(tmp_path / "other")
    fails("lm_head of .*other is not the one .*that of .*student", student=tmp_path / "other")
    Tokenizer(WordLevel({"word": 0}, unk_token="word")).save(str(student_directory / "tokenizer.json"))
    fails("tokenizer of .* is not the one", student=student_directory)


def test_a_pack_of_other_steps_is_refused(
    cache: Path, student_directory: Path, tmp_path: Path, training: MakeTraining
) -> None:
    with pytest.raises(HyloError, match="made with rows 4, not 2"):
        extend_from_cache(student_directory, cache, tmp_path / "out", of_cache(training, rows=2), 8)


def test_a_student_with_the_same_head_may_be_another(
    cache: Path, base: PreTrainedModel, build_student: Any, tmp_path: Path, training: MakeTraining
) -> None:
    build_student(base, ["mamba2", "mla", "gated_deltanet"]).save_pretrained(tmp_path / "other")
    extend_from_cache(tmp_path / "other", cache, tmp_path / "out", of_cache(training), 8, console=QUIET)
    assert steps_of(tmp_path / "out")[-1]["loss"] > 0
