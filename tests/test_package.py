"""The package as installed: what importing it pulls in, and what it registers."""

import subprocess
import sys

# transformers itself imports triton where that is installed; our kernels come with the first tensor on a GPU.
EXTRAS = (
    "fla",
    "lm_eval",
    "vllm",
    "tensorboard",
    "trackio",
    "wandb",
    "trl",
    "liger_kernel",
    "hylo.ops.divergence_triton",
)


def test_the_core_imports_no_extra_and_registers_the_model() -> None:
    code = (
        "import sys, hylo, hylo.cli, hylo.pipeline, hylo.demo\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('hylo')\n"
        "assert type(config).__name__ == 'HyloConfig'\n"
        "assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == 'HyloForCausalLM'\n"
        f"print([name for name in {EXTRAS!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
