"""What others run: lm-eval and pipelines that never import this package, accelerate, torch.compile, bf16, shards."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hylo.convert import convert
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.plan import make_plan

TOKENS = torch.arange(1, 41)[None]

# Loads the directory through its own file, saves it again, and says what was loaded, as it would be on a first day.
LOAD_AND_SAVE = """
import sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

directory, again = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(directory)
except ValueError as error:
    print("trust_remote_code=True" in str(error))
inner = AutoModel.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
with torch.no_grad():
    total = model(torch.arange(1, 41)[None]).logits.sum().item()
print(type(model).__module__, type(inner).__name__, total)
model.save_pretrained(again)
"""
GENERATE = """
import sys
from transformers import pipeline

generate = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, device="cpu")
print(generate("The 12th row of the table", max_new_tokens=6, do_sample=False)[0]["generated_text"])
"""


@pytest.fixture(autouse=True, scope="module")
def _no_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with each of our mixers."""
    torch.manual_seed(0)
    mixers = ["mla", "gated_deltanet", "mamba2"]
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    mla = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 16}
    mamba = {"mamba_d_state": 8, "mamba_head_dim": 8, "mamba_d_inner": 32, "mamba_d_xb": 16, "gdn_head_dim": 8}
    config = HyloConfig(**sizes, **mla, **mamba, mixers=mixers, qk_norm=True, initializer_range=0.2, pad_token_id=0)
    out = tmp_path_factory.mktemp("ecosystem") / "mixed"
    HyloForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def directory(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ecosystem") / "hybrid"
    convert(tiny_base, out, make_plan(tiny_base, "1MLA2GDN"))
    return out


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs Python in a process of its own that nobody answers, with caches of its own; returns what it prints."""
    caches = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}

    def run(*arguments: object) -> str:
        process = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=os.environ | caches | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


@pytest.fixture
def again(directory: Path, run: Callable[..., str], tmp_path: Path) -> Path:
    """The directory loaded and saved again in a process that never imports the package itself."""
    printed = run("-c", LOAD_AND_SAVE, directory, tmp_path / "again").split("\n")
    total = load(directory)(TOKENS).logits.sum().item()
    assert printed[-3].endswith("True")  # after the question that transformers prints
    module, inner, its_total = printed[-2].split()
    assert (module, inner) == ("hylo.modeling.model", "HyloModel")
    assert float(its_total) == pytest.approx(total, rel=1e-5)
    return tmp_path / "again"


def load(directory: Path, **options: Any) -> HyloForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    assert type(model) is HyloForCausalLM
    return model


def test_saving_again_gives_the_same_directory(
    directory: Path, again: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "modeling_hylo.py"
    assert [path.name for path in again.glob("*.py")] == [path.name for path in directory.glob("*.py")] == [code]
    assert (again / code).read_text() == (directory / code).read_text()
    assert auto_map(again) == auto_map(directory)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    assert torch.equal(load(again)(TOKENS).logits, load(directory)(TOKENS).logits)  # the package is imported here
    run("-c", LOAD_AND_SAVE, again, again.parent / "third")
    assert auto_map(again.parent / "third") == auto_map(directory)


def auto_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / "config.json").read_text())["auto_map"]


def test_a_pipeline_generates(directory: Path, run: Callable[..., str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("The 12th row of the table", return_tensors="pt")
    tokens = load(directory).generate(**prompt, max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert run("-c", GENERATE, directory).removesuffix("\n") == text


def test_the_evaluation_harness_scores_and_generates(directory: Path, run: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"question": f"The {n}th row says that", "choices": ["yes", f"{n * n} is the square"]} for n in (3, 40)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}}}
    shared = data | {"test_split": "test", "doc_to_text": "{{question}}"}
    choose = {"task": "squares", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 1}
    complete = {"task": "rows", "output_type": "generate_until", "doc_to_target": "{{choices[1]}}"}
    complete["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    complete["metric_list"] = [{"metric": "exact_match"}]
    (tmp_path / "tasks").mkdir()
    for task in (choose, complete):
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    model_arguments = f"pretrained={directory},trust_remote_code=True"
    run(
        *("-m", "lm_eval", "--model", "hf", "--model_args", model_arguments, "--device", "cpu", "--batch_size", 4),
        *("--tasks", "squares,rows", "--include_path", tmp_path / "tasks"),
        *("--output_path", tmp_path / "results", "--log_samples"),
    )
    samples = {path.name.split("_")[1]: path for path in (tmp_path / "results").rglob("samples_*.jsonl")}
    model, tokenizer = load(directory), AutoTokenizer.from_pretrained(directory)
    for row, line in zip(rows, samples["squares"].read_text().splitlines(), strict=True):
        scores = [float(response[0][0]) for response in json.loads(line)["resps"]]
        question, choices = str(row["question"]), row["choices"]
        expected = [log_likelihood(model, tokenizer, question, f" {choice}") for choice in choices]
        assert scores == pytest.approx(expected, abs=1e-3)
    for row, line in zip(rows, samples["rows"].read_text().splitlines(), strict=True):
        prompt = tokenizer(row["question"], return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert json.loads(line)["resps"][0][0] == text.split("\n")[0]


def log_likelihood(model: HyloForCausalLM, tokenizer: Any, question: str, answer: str) -> float:
    """Of the answer's tokens, in one unpadded row."""
    tokens = tokenizer(question + answer, return_tensors="pt").input_ids
    start = tokenizer(question, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        log_p = F.log_softmax(model(tokens).logits[0, :-1], dim=-1)
    return float(log_p.gather(1, tokens[0, 1:, None])[start - 1 :].sum())


def test_accelerate_places_layers(mixed: Path, tmp_path: Path) -> None:
    logits = load(mixed)(TOKENS).logits
    assert torch.equal(load(mixed, device_map="auto")(TOKENS).logits.cpu(), logits)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = load(mixed, device_map=places, offload_folder=tmp_path)
    assert next(model.model.layers[1].parameters()).is_meta
    assert torch.equal(model(TOKENS).logits, logits)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 43)


NO_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler"))]
)
def test_the_forward_compiles(mixed: Path, backend: str) -> None:
    model = load(mixed)
    logits = model(TOKENS, use_cache=False).logits
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)


def test_bf16_runs(mixed: Path) -> None:
    model = load(mixed, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = load(mixed)(TOKENS).logits
    assert (model(TOKENS).logits.float() - logits).norm() < 0.1 * logits.norm()  # of 8 bits, through three layers
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 43)


def test_shards_give_the_model_back(mixed: Path, tmp_path: Path) -> None:
    model = load(mixed)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path)(TOKENS).logits, model(TOKENS).logits)
