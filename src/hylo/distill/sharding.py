"""Student and teacher shared out over the processes: FSDP2, by its own calls.

`fully_shard` is called here and not by the Trainer (accelerate and torchrun only launch), because accelerate's own path
shards the trained model alone, when training begins, and refuses tied embeddings. Here

- every layer is a unit, whole only while it computes. Stage 1 calls layers one by one, each with a backward pass of its
  own, and each is then its own root; stage 2 calls the decoder, which is the root of all;
- the frozen teacher is cut up in the same way, and has neither gradients nor optimiser state;
- the head is never whole: the losses of hylo.ops.sharded_divergence use each process's own rows of it;
- clipping and optimiser know sharded weights from the start.

Stages through TRL, which call the whole model and write with it, are not sharded: there every process has all.
A gradient is the average over the processes of each one's own, so a process's loss is the average over its own rows.
"""

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from packaging.version import parse
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from hylo.errors import HyloError
from hylo.parallel import is_main, world_size

SHARDS_FROM = "5.19.0"  # transformers whose Trainer leaves sharded models to others


def place(model: PreTrainedModel, device: torch.device) -> None:
    """Puts a decoder and its head (Llama, Qwen, hylo; parts of one too) on the device, or its part on each process's.

    Of sharded models, parameters are other objects afterwards. The decoder and its layers are called as before; of
    `lm_head`, only the weight can be used, a DTensor of which each process holds rows.
    """
    if world_size() == 1:
        model.to(device)
        return
    mesh = init_device_mesh(device.type, (world_size(),))
    decoder, head = model.model, model.lm_head
    embedding = decoder.embed_tokens
    tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
    for unit in (embedding, *decoder.layers, decoder.norm, decoder):
        # Also of a root, which otherwise stays whole until its backward pass, and the teacher has none.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    embedding.set_unshard_in_backward(False)
    if tied:
        head.weight = embedding.weight
    else:
        fully_shard(head, mesh=mesh)


def leave_to_us(module: nn.Module) -> None:
    """Tells the Trainer that such a module's placing and gradients are not its affair.

    Raises HyloError with several processes and a Trainer that cannot be told.
    """
    if world_size() > 1 and parse(transformers.__version__) < parse(SHARDS_FROM):
        raise HyloError(
            f"several processes need transformers {SHARDS_FROM} or later, and {transformers.__version__} is installed; "
            f'pip install "transformers>={SHARDS_FROM}"'
        )
    module.is_distributed_loading_by_transformers = world_size() > 1  # type: ignore[assignment]


def clip_grad_norm(parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """Clips the gradient of all of them together to the norm `clip`, over all processes; returns its norm before."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, clip, norm)
    return norm


def gathered(tree: Any) -> Any:
    """A state dict (dicts, lists, tensors, anything) with its sharded tensors whole, on the CPU of the first process.

    All processes must call it; elsewhere those tensors come out empty. One at a time is whole on the device.
    """
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value) for value in tree)
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if is_main() else whole.new_empty(0)
    return tree


def whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `model.save_pretrained(state_dict=...)` takes, a tied head once; all processes call it, the first saves."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return gathered({name: tensor for name, tensor in model.state_dict().items() if name in once})


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, as `like` is kept: this process's part of it, or all of it."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
