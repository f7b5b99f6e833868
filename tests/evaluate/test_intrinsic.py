"""Intrinsic measures on directories, against transformers' logits and stage 1's own states."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting_bar import CountingBar
from transformers import LlamaConfig, LlamaForCausalLM

from hylo.checkpoint import copy_companions
from hylo.distill.align import TeacherLayers, l2_distance
from hylo.errors import HyloError
from hylo.evaluate.forward import Scorer, Teacher
from hylo.evaluate.held_out import held_out
from hylo.evaluate.intrinsic import IntrinsicSettings, check_intrinsic, evaluate_intrinsic
from hylo.evaluate.mixer_error import mixer_distances
from hylo.evaluate.perplexity import bucket_edges, text_score
from hylo.evaluate.subject import Subject
from hylo.modeling import HyloConfig, HyloForCausalLM

MIXERS = ["attention", "gated_deltanet", "mla"]


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches and tiles, with remainders."""
    monkeypatch.setattr("hylo.evaluate.rows.BATCH_TOKENS", 300)
    monkeypatch.setattr("hylo.evaluate.perplexity.TILE_LOGITS", 37 * 600)


@pytest.fixture(scope="module")
def hybrid(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Of the base's shape, with its embeddings and its first layer's attention, everything else random."""
    directory = tmp_path_factory.mktemp("hybrids") / "hybrid"
    base = LlamaForCausalLM.from_pretrained(tiny_base)
    config = HyloConfig(
        **{key: getattr(base.config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        mixers=MIXERS,
        rope_parameters=base.config.rope_parameters,
        max_position_embeddings=512,
        rms_norm_eps=base.config.rms_norm_eps,
        tie_word_embeddings=True,
        initializer_range=0.1,
        gdn_num_heads=2,
        gdn_head_dim=8,
    )
    torch.manual_seed(1)
    model = HyloForCausalLM(config)
    model.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    model.model.layers[0].mixer.load_state_dict(base.model.layers[0].self_attn.state_dict())
    model.save_pretrained(directory)
    copy_companions(tiny_base, directory)
    return Subject("hybrid", directory)


@pytest.fixture
def base(tiny_base: Path) -> Subject:
    return Subject("base", tiny_base)


def settings(text: Path, tokens: int = 600, lengths: tuple[int, ...] = (100, 150)) -> IntrinsicSettings:
    return IntrinsicSettings(lengths, tokens, text=(str(text),))


def measure(subject: Subject, asked: IntrinsicSettings, teacher: Teacher | None) -> tuple[dict, dict, CountingBar]:
    with CountingBar() as bar:
        result, not_run = evaluate_intrinsic(subject, asked, teacher, bar)
    assert json.loads(json.dumps(result)) == result and bar.announced == bar.read
    return result, not_run, bar


def error_of_mean(values: np.ndarray) -> float:
    return float(np.sqrt(values.var(ddof=1) / len(values)))


def test_buckets_double() -> None:
    assert bucket_edges(2) == [0, 2] and bucket_edges(33) == [0, 33] and bucket_edges(34) == [0, 32, 34]
    assert bucket_edges(64) == [0, 32, 64] and bucket_edges(150) == [0, 32, 64, 128, 150]


def test_perplexity_and_kl_by_position(hybrid: Subject, base: Subject, text_file: Path, small_pieces: None) -> None:
    result, not_run, bar = measure(hybrid, settings(text_file), Teacher(base))
    rows = settings(text_file).rows(held_out(hybrid, (str(text_file),)))
    assert not_run == {} and result["tokens"] == {"100": 400, "150": 600}
    assert bar.read == 400 + 600 + 100 + 150 + 400  # the last to compare mixers
    for length, ids in rows.items():
        with torch.no_grad():
            q, p = (model(ids).logits.double().log_softmax(-1) for model in (hybrid.model, base.model))
        loss = F.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert result["row_loss"][str(length)] == pytest.approx(loss.mean(1).tolist(), rel=1e-4)
        parts = result["by_position"][str(length)]
        assert [parts[0]["from"], *(part["to"] for part in parts)] == bucket_edges(length)
        whole = {"from": 0, "to": length} | {
            key: result[key][str(length)] for key in ("perplexity", "perplexity_se", "kl", "kl_se")
        }
        for part in [*parts, whole]:
            here = slice(part["from"], part["to"])
            losses, divergences = (x[:, here].mean(1).numpy() for x in (loss, kl))
            assert part["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
            assert part["perplexity_se"] == pytest.approx(math.exp(losses.mean()) * error_of_mean(losses), rel=1e-3)
            assert part["kl"] == pytest.approx(divergences.mean(), rel=1e-4)
            assert part["kl_se"] == pytest.approx(error_of_mean(divergences), rel=1e-3)


def test_mixers_are_those_of_stage_1(hybrid: Subject, base: Subject, text_file: Path, small_pieces: None) -> None:
    result, _, _ = measure(hybrid, settings(text_file), Teacher(base))
    ids = settings(text_file).rows(held_out(hybrid, (str(text_file),)))[100]
    student, outputs = hybrid.model, {}
    with torch.no_grad():
        states = TeacherLayers(LlamaForCausalLM.from_pretrained(base.directory))({"input_ids": ids})
        for i, layer in enumerate(student.model.layers):
            hook = layer.mixer.register_forward_hook(lambda module, args, output, i=i: outputs.update({i: output}))
            layer(states[i].input, **student.model.layer_inputs(states[i].input))
            hook.remove()
    measured = result["mixer_error"]
    assert [(layer["layer"], layer["mixer"]) for layer in measured] == list(enumerate(MIXERS))
    assert measured[0]["error"] == pytest.approx(0, abs=1e-5)  # this one hears the same, but for its norm
    for i, layer in enumerate(measured):
        distance, size = l2_distance(outputs[i], states[i].mixer_output), states[i].mixer_output.norm(dim=-1).mean()
        assert layer["distance"] == pytest.approx(distance.item(), rel=1e-4, abs=1e-6)
        assert layer["error"] == pytest.approx((distance / size).item(), rel=1e-4, abs=1e-5)
    assert measured[1]["error_se"] > 0 and measured[1]["error"] > 0.1


def test_a_mixer_that_says_nothing_has_error_one_and_leaves_no_hook(hybrid: Subject, base: Subject) -> None:
    silent = HyloForCausalLM.from_pretrained(hybrid.directory).eval()
    silent.model.layers[1].mixer.o_proj.weight.data.zero_()
    for _ in range(2):
        (row,) = mixer_distances(silent, base.model, torch.arange(50)[None])
        assert len(row["distance"]) == 3 and row["distance"][1] == pytest.approx(row["size"][1], rel=1e-6)


def test_memory_of_every_length(hybrid: Subject, text_file: Path) -> None:
    result, _, _ = measure(hybrid, settings(text_file), None)
    assert "kl" not in result and "mixer_error" not in result
    config = hybrid.config
    per_token = 4 * (2 * 2 * 16 + config.kv_lora_rank + config.qk_rope_head_dim)
    held = result["memory"]
    assert {length: memory["cache_bytes_per_token"] for length, memory in held.items()} == {
        "100": per_token,
        "150": per_token,
    }
    assert held["100"]["state_bytes"] == held["150"]["state_bytes"] > 0


def test_what_is_recorded_is_not_read_again(
    hybrid: Subject, base: Subject, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, _ = measure(hybrid, settings(text_file), Teacher(base))
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "model", property(lambda self: pytest.fail("loaded")))
        again, _, bar = measure(hybrid, settings(text_file), Teacher(base))
    assert again == first and bar.read == 0
    more, _, bar = measure(hybrid, settings(text_file, tokens=900), Teacher(base))
    assert bar.read == 2 * 100 + 2 * 150 + 2 * 100  # two rows more of each length, and to compare mixers
    assert more["tokens"] == {"100": 600, "150": 900}


def test_another_teacher_or_longest_length_is_another_set(hybrid: Subject, base: Subject, text_file: Path) -> None:
    shorter, longer = (settings(text_file, 400, lengths) for lengths in ((100,), (100, 200)))
    _, _, bar = measure(hybrid, shorter, None)
    assert bar.read == 400 + 100
    result, _, bar = measure(hybrid, shorter, Teacher(base))
    assert bar.read == 400 + 100 + 400 and "kl" in result
    _, _, bar = measure(hybrid, longer, None)  # whose short rows are cut from long ones
    assert bar.read == 400 + 400 + 100 + 200


def test_interrupted_in_the_middle_it_goes_on(
    hybrid: Subject, base: Subject, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_pieces: None
) -> None:
    expected, _, _ = measure(hybrid, settings(text_file), Teacher(base))
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "another"))
    hidden, calls = Scorer.hidden, []

    def interrupted(self: Scorer, ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape)
        if len(calls) == 4:  # the teacher, on the second batch
            raise KeyboardInterrupt
        return hidden(self, ids)

    monkeypatch.setattr(Scorer, "hidden", interrupted)
    with CountingBar() as bar, pytest.raises(KeyboardInterrupt):
        evaluate_intrinsic(hybrid, settings(text_file), Teacher(base), bar)
    result, _, rest = measure(hybrid, settings(text_file), Teacher(base))
    assert bar.read == 300 and rest.read == bar.announced - 300
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}


def test_out_of_memory_halves_and_what_fails_alone_is_told(
    hybrid: Subject, base: Subject, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected, _, _ = measure(hybrid, settings(text_file), Teacher(base))
    hidden = Scorer.hidden

    def small(self: Scorer, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[0] > 1 or ids.shape[1] == 150:
            raise torch.OutOfMemoryError("no room")
        return hidden(self, ids)

    monkeypatch.setattr(Scorer, "hidden", small)
    monkeypatch.setenv("HYLO_CACHE", str(tmp_path / "another"))
    result, not_run, _ = measure(hybrid, settings(text_file), Teacher(base))
    assert result["perplexity"] == {"100": pytest.approx(expected["perplexity"]["100"], rel=1e-6)}
    assert result["kl"]["100"] == pytest.approx(expected["kl"]["100"], rel=1e-5)
    assert list(not_run) == ["text at 150 of hybrid"]
    assert not_run["text at 150 of hybrid"] == "4 of 4 rows failed: OutOfMemoryError: no room"
    monkeypatch.setattr(Scorer, "hidden", hidden)
    mended, not_run, bar = measure(hybrid, settings(text_file), Teacher(base))
    assert not_run == {} and bar.read == 600 and mended["by_position"].keys() == {"100", "150"}


def test_values_that_are_not_finite_are_a_failure(hybrid: Subject, text_file: Path, tmp_path: Path) -> None:
    broken = Subject("broken", hybrid.directory)
    broken.model.model.norm.weight.data.fill_(math.inf)
    result, not_run, _ = measure(broken, settings(text_file, lengths=(100,)), None)
    assert result["perplexity"] == {} and "not finite" in not_run["text at 100 of broken"]


def test_a_teacher_keeps_no_more_than_it_has_room_for(
    hybrid: Subject, base: Subject, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = settings(text_file).rows(held_out(base, (str(text_file),)))[100]
    row_bytes = 100 * base.config.hidden_size * 4
    hidden, read = Scorer.hidden, []
    monkeypatch.setattr(Teacher, "hidden", lambda self, ids: read.append(len(ids)) or hidden(self, ids))
    unbounded = text_score(Scorer(hybrid), rows, Teacher(base))
    teacher = Teacher(base, room=2 * row_bytes + 1)
    read.clear()
    for _ in range(2):
        assert text_score(Scorer(hybrid), rows, teacher) == unbounded
    assert read == [4, 4] and teacher.room == 1  # a batch of which some is known is read again
    small = rows[:2]
    text_score(Scorer(hybrid), small, teacher)
    assert read == [4, 4]


def test_a_model_is_not_held_against_itself(base: Subject, text_file: Path) -> None:
    result, not_run, bar = measure(base, settings(text_file), Teacher(Subject("teacher", base.directory)))
    assert "kl" not in result and not_run == {} and bar.read == 400 + 600 + 100 + 150


def test_a_teacher_of_another_shape(hybrid: Subject, base: Subject, text_file: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(base.directory)
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(tmp_path / "larger")
    teacher = Subject("larger", tmp_path / "larger")
    check_intrinsic(hybrid, settings(text_file), teacher)
    result, not_run, _ = measure(hybrid, settings(text_file), Teacher(teacher))
    assert "mixer_error" not in result and result["kl"]["100"] > 0
    said = "the teacher has 2 layers of width 32, the model 3 layers of width 32; give the base it was converted from"
    assert not_run["mixer_error of hybrid"].startswith(said)


@pytest.mark.parametrize(
    "lengths, text, message",
    [
        ((1024,), None, "intrinsic at 1024 tokens exceeds the context of hybrid, 512"),
        ((1,), None, "a row of 1 tokens has nothing to predict"),
        ((100,), "a few words", "tokens, fewer than one row of 100"),
        ((256,), None, "intrinsic at 256 tokens exceeds the context of teacher, 128"),
        ((100,), None, "the teacher's vocabulary has 99 tokens and the model's"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(
    lengths: tuple[int, ...],
    text: str | None,
    message: str,
    hybrid: Subject,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if text is not None:
        text_file = tmp_path / "short.txt"
        text_file.write_text(text)
    small = {
        "vocab_size": 99,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=128)).save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(Subject, "model", property(lambda self: pytest.fail("loaded")))
    with pytest.raises(HyloError, match=message):
        check_intrinsic(hybrid, settings(text_file, lengths=lengths), Subject("teacher", tmp_path / "teacher"))


def test_the_room_is_a_quarter_of_what_a_container_may_use(
    base: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hylo.evaluate.forward.CGROUP_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text("max\n")
    whole = Teacher(base).room
    (tmp_path / "memory.max").write_text("4000\n")
    assert Teacher(base).room == 1000 < whole
