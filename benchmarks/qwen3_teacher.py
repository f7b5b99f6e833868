"""A Qwen3 with the demo's teacher in it, for benchmarks/initialisation.py --teacher: a base whose key norm matters.

    python benchmarks/qwen3_teacher.py --out qwen3-teacher

The demo's teacher is a Llama. Its weights go into the Qwen3 of the same shape, whose query and key norms start at the
root mean square of the teacher's own queries and keys; then the whole is distilled from the teacher (hylo.distill),
as a hybrid with no layer replaced.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hylo.checkpoint import copy_companions, read_tokenizer
from hylo.convert import convert
from hylo.data.settings import Data
from hylo.data.sources import STANDARD_LIBRARY
from hylo.data.training import TrainingData
from hylo.demo import TEACHER
from hylo.distill.extend import extend
from hylo.distill.settings import Training
from hylo.plan import make_plan

LENGTH = 256


def starting_point(rows_BT: Tensor) -> Qwen3ForCausalLM:
    """The teacher's weights, and norms with one gain a layer: the rms of its queries, or keys, on `rows_BT`."""
    teacher = LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    kept = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp", "transformers_version")
    config = {key: value for key, value in teacher.config.to_dict().items() if key not in kept}
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    gains: dict[str, Tensor] = {}

    def watch(name: str, projection: nn.Module) -> None:
        projection.register_forward_hook(
            lambda _module, _inputs, output: gains.update({name: output.square().mean().sqrt()})
        )

    for i, layer in enumerate(teacher.model.layers):
        watch(f"model.layers.{i}.self_attn.q_norm.weight", layer.self_attn.q_proj)
        watch(f"model.layers.{i}.self_attn.k_norm.weight", layer.self_attn.k_proj)
    with torch.no_grad():
        teacher(rows_BT)
    weights = teacher.state_dict() | {name: gain.expand(config["head_dim"]) for name, gain in gains.items()}
    model.load_state_dict(weights)
    return model


def write_as_qwen3(hybrid: Path, start: Path, out: Path) -> None:
    """The hybrid's tensors under the base's names, in bfloat16, beside the base's own configuration."""
    tensors = {
        name.replace(".mixer.", ".self_attn."): tensor.to(torch.bfloat16)
        for file in sorted(hybrid.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    start.rename(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    data = TrainingData(Data(text=[STANDARD_LIBRARY], facts=0.5), read_tokenizer(TEACHER))
    with TemporaryDirectory(dir=arguments.out.parent) as folder:
        start, unchanged, trained = (Path(folder) / name for name in ("start", "unchanged", "trained"))
        starting_point(data.calibration(4096, LENGTH)).save_pretrained(start)
        copy_companions(TEACHER, start)
        convert(start, unchanged, make_plan(start, "6A", dtype="float32"))
        training = Training(tokens=arguments.tokens, length=LENGTH, rows=16, learning_rate=1e-3, warmup=0.1)
        extend(unchanged, TEACHER, trained, data.rows("qwen3", 0), training, LENGTH, Console())
        write_as_qwen3(trained, start, arguments.out)
        shutil.copy(trained / "metrics.jsonl", arguments.out)


if __name__ == "__main__":
    main()
