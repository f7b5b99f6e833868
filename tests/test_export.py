"""Portable directories load, generate and are saved again in processes that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports
from transformers.utils import logging

from hylo.checkpoint import copy_companions
from hylo.errors import HyloError
from hylo.export import export_portable, flatten, portable_sources
from hylo.modeling import HyloConfig, HyloForCausalLM
from hylo.modeling.loading import load_model

MIXERS = ["mla", "gated_deltanet", "mamba2", "kda", "attention"]
TOKENS = torch.arange(1, 12)[None]

WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hylo":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
directory, again, expected, needing_the_package = map(Path, sys.argv[1:])
try:
    AutoModelForCausalLM.from_pretrained(needing_the_package, trust_remote_code=True)
except ImportError as error:
    assert "`hylo export DIR OUT --portable`" in str(error), error
else:
    raise AssertionError("loaded without the package")
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
expected = load_file(expected)
tokens = expected["tokens"]
assert torch.equal(model(tokens).logits, expected["logits"])
assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), expected["generated"])
inner = AutoModel.from_pretrained(directory, trust_remote_code=True)
assert torch.equal(inner(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
assert not [name for name in sys.modules if name.split(".")[0] == "hylo"]
model.save_pretrained(again)
"""


@pytest.fixture(scope="module")
def hybrid(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a few shards, with every kind of mixer, a tokenizer and a file that no model needs."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8}
    mla = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 16}
    mamba = {"mamba_d_state": 8, "mamba_head_dim": 8, "mamba_d_inner": 32, "mamba_d_xb": 16, "gdn_head_dim": 8}
    kda = {"kda_num_heads": 2, "kda_head_dim": 8}
    special = {"eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
    directory = tmp_path_factory.mktemp("export") / "mixed-1.0"
    model = HyloForCausalLM(HyloConfig(**sizes, **mla, **mamba, **kda, **special, mixers=MIXERS))
    model.save_pretrained(directory, max_shard_size="60KB")
    copy_companions(tiny_base, directory)
    (directory / "generation_config.json").write_text(json.dumps({"pad_token_id": 0}))
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


@pytest.fixture(scope="module")
def portable(hybrid: Path) -> Path:
    out = hybrid.parent / "portable-1.0"
    export_portable(hybrid, out)
    return out


def test_the_model_as_it_is_without_the_package(hybrid: Path, portable: Path, tmp_path: Path) -> None:
    model = load_model(hybrid)
    with torch.no_grad():
        expected = {"tokens": TOKENS, "logits": model(TOKENS).logits}
    expected["generated"] = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    save_file(expected, tmp_path / "expected.safetensors")
    for directory, again in ((portable, tmp_path / "again"), (tmp_path / "again", tmp_path / "once more")):
        arguments = [directory, again, tmp_path / "expected.safetensors", hybrid]
        process = subprocess.run(
            [sys.executable, "-c", WITHOUT_THE_PACKAGE, *map(str, arguments)],
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
    for name, text in portable_sources().items():
        assert (tmp_path / "once more" / name).read_text() == text


def test_the_directory_holds_the_model_and_its_code(hybrid: Path, portable: Path) -> None:
    files, code = {path.name for path in hybrid.iterdir()}, set(portable_sources())
    assert {path.name for path in portable.iterdir()} == files - {"metrics.jsonl"} | code
    assert json.loads((portable / "config.json").read_text()) == json.loads((hybrid / "config.json").read_text())
    shards = sorted(portable.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert shard.samefile(hybrid / shard.name)
    model, tokens = load_model(portable), TOKENS
    assert type(model) is HyloForCausalLM  # with the package, the package's own code runs
    assert torch.equal(model(tokens).logits, load_model(hybrid)(tokens).logits)


def test_weights_are_copied_where_links_cannot_be(
    hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", no_link)
    export_portable(hybrid, tmp_path / "out")
    for shard in hybrid.glob("*.safetensors"):
        assert not (tmp_path / "out" / shard.name).samefile(shard)
        assert load_file(tmp_path / "out" / shard.name).keys() == load_file(shard).keys()


def test_the_code_differs_in_import_lines_only_and_needs_torch_and_transformers_only(portable: Path) -> None:
    root = Path(sys.modules["hylo"].__file__ or "").parent
    for name, text in portable_sources().items():
        assert set(get_imports(portable / name)) - set(sys.stdlib_module_names) <= {"torch", "transformers"}
        if name == "modeling_hylo.py":
            continue
        package, module = name.removeprefix("hylo_").split("_", 1)
        original = (root / package / module).read_text().splitlines()
        for ours, theirs in zip(original, text.splitlines(), strict=True):
            assert ours == theirs or ours.replace("hylo.modeling.", ".hylo_modeling_") == theirs.replace(
                ".hylo_ops_", "hylo.ops."
            )


def test_imports_from_the_rest_of_the_package_are_refused() -> None:
    with pytest.raises(HyloError, match=r"loading\.py, line \d+, imports hylo\.checkpoint: .* hylo\.ops only"):
        flatten("hylo.modeling.loading")


def test_what_cannot_be_exported_is_named(hybrid: Path, tiny_base: Path, tmp_path: Path) -> None:
    def refused(directory: Path, out: Path, *named: str) -> None:
        with pytest.raises(HyloError) as error:
            export_portable(directory, out)
        assert "\n" not in str(error.value)
        for part in named:
            assert part in str(error.value)

    refused(tmp_path / "nowhere", tmp_path / "out", "nowhere", "does not exist")
    refused(tiny_base, tmp_path / "out", str(tiny_base), "model_type llama")
    refused(hybrid, hybrid.parent, str(hybrid.parent), "exists already")
    (tmp_path / "config.json").write_text('{"model_type": "hylo"}')
    refused(tmp_path, tmp_path / "out", str(tmp_path), "model.safetensors")
    assert not (tmp_path / "out").exists()
