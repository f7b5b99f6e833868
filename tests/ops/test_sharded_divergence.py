"""Two processes, each with half of the heads' rows, against the plain forms in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HELPERS, run, torchrun
from torch import Tensor

from hylo.ops.cross_entropy import naive_cross_entropy
from hylo.ops.divergence import KINDS, naive_divergence, teacher_vectors

N, V, D = 26, 19, 8  # 13 tokens and 10 or 9 rows of the heads to a process; tiles of 5 tokens
Case = tuple[str, dict[str, Tensor], dict[str, Any]]


def cases() -> list[Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    tensors = {"hidden": draw(N, D).requires_grad_(), "head": draw(V, D).requires_grad_()}
    tensors |= {"teacher_hidden": draw(N, D + 4), "teacher_head": draw(V, D + 4)}
    masks = torch.arange(N).view(2, -1) % 3 != 0  # of which the processes keep different numbers
    labels = torch.randint(V, (N,))
    labels[::4] = -100
    student = {"hidden": tensors["hidden"], "head": tensors["head"]}
    head = tensors["head"].detach()
    vectors, neg_entropy = teacher_vectors(tensors["teacher_hidden"], tensors["teacher_head"], head, 2.0)
    cached = {"hidden": tensors["hidden"], "head": head, "vectors": vectors, "neg_entropy": neg_entropy}
    return [
        *[("divergence", tensors, {"kind": kind}) for kind in KINDS],
        *[("divergence", tensors, {"kind": kind, "temperature": 2.0, "beta": 0.3, "mask": masks}) for kind in KINDS],
        ("divergence", tensors, {"reduction": "sum"}),
        ("divergence", tensors | {"head": head}, {}),
        ("cross_entropy", student | {"labels": labels}, {}),
        ("cross_entropy", student | {"labels": labels}, {"mask": masks, "reduction": "sum"}),
        ("cached", cached, {"temperature": 2.0, "mask": masks}),
    ]


def alone(case: Case, process: int) -> Tensor:
    """One process's loss, from whole heads and logits."""
    operation, tensors, options = case
    mine = {name: t if name.endswith("head") else t.chunk(2)[process] for name, t in tensors.items()}
    options = {key: value[process] if key == "mask" else value for key, value in options.items()}
    if operation == "divergence":
        return naive_divergence(*mine.values(), **options)
    if operation == "cross_entropy":
        return naive_cross_entropy(*mine.values(), **options)
    logits, mask = mine["hidden"] @ mine["head"].T / options["temperature"], options["mask"].double()
    values = logits.logsumexp(-1) - (mine["hidden"] * mine["vectors"]).sum(-1) + mine["neg_entropy"]
    return (values * mask).sum() / mask.sum()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, list[Any]]]:
    """Every case with what each of the two processes got."""
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("sharded")
    made = cases()
    torch.save(made, folder / "in")
    done = run(torchrun(2, HELPERS / "sharded_losses.py", folder / "in", folder / "out"))
    assert done.returncode == 0, done.stderr
    results = [torch.load(folder / f"out.{process}") for process in range(2)]
    return list(zip(made, zip(*results, strict=True), strict=True))


def test_losses_are_those_of_each_process_alone(compared: list[tuple[Case, list[Any]]]) -> None:
    assert len(compared) == 11
    for case, results in compared:
        for process, (loss, _) in enumerate(results):
            torch.testing.assert_close(loss, alone(case, process).detach(), rtol=1e-12, atol=1e-13, msg=str(case[2]))


def test_gradients_are_those_of_the_whole(compared: list[tuple[Case, list[Any]]]) -> None:
    """Hidden states get their own process's gradient, the head the average of both; the loss was scaled by 3."""
    for case, results in compared:
        hidden, head = case[1]["hidden"], case[1]["head"]
        losses = [3 * alone(case, process) for process in range(2)]
        (want_hidden,) = torch.autograd.grad(sum(losses), [hidden], retain_graph=True)
        got = torch.cat([gradients[0] for _, gradients in results])
        torch.testing.assert_close(got, want_hidden, rtol=1e-11, atol=1e-13, msg=str(case))
        assert len(results[0][1]) == 1 + head.requires_grad
        if head.requires_grad:
            (want_head,) = torch.autograd.grad(sum(losses) / 2, [head])
            for _, gradients in results:
                torch.testing.assert_close(gradients[1], want_head, rtol=1e-11, atol=1e-13, msg=str(case))
