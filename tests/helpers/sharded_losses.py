"""What two processes get from heads of which each holds half: OUT is a torch file of every case's loss and gradients.

Run by a launcher: `sharded_losses.py IN OUT`, where IN holds the cases and the tensors of both processes.
"""

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hylo import parallel
from hylo.ops import head_products, head_tiles
from hylo.ops.cross_entropy import hidden_state_cross_entropy
from hylo.ops.divergence import cached_divergence, hidden_state_divergence

OPERATIONS = {
    "divergence": hidden_state_divergence,
    "cross_entropy": hidden_state_cross_entropy,
    "cached": cached_divergence,
}


def main() -> None:
    given, out = sys.argv[1:]
    head_tiles.TILE_ROWS, head_tiles.TILE_ELEMENTS, head_products.CPU_COLUMNS = 5, 1, 4
    torch.set_num_threads(1)
    parallel.start()
    mesh = init_device_mesh("cpu", (parallel.world_size(),))
    results = []
    for operation, tensors, options in torch.load(given):
        arguments = []
        for name, tensor in tensors.items():
            if name.endswith("head"):
                part = distribute_tensor(tensor, mesh, [Shard(0)])
                arguments.append(nn.Parameter(part, requires_grad=tensor.requires_grad))
            else:
                own = tensor.chunk(parallel.world_size())[parallel.rank()].detach()
                arguments.append(own.requires_grad_(tensor.requires_grad))
        mine = {key: value[parallel.rank()] if key == "mask" else value for key, value in options.items()}
        loss = OPERATIONS[operation](*arguments, **mine)
        (3 * loss).backward()
        gradients = [argument.grad for argument in arguments if argument.requires_grad]
        results.append((loss.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]))
    torch.save(results, f"{out}.{parallel.rank()}")
    parallel.end()


main()
