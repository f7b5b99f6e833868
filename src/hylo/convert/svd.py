"""The low-rank factorisation behind every MLA initialisation."""

import torch
from torch import Tensor

from hylo.convert.device import compute_device

DAMPING = 0.01  # of the mean of the covariance's diagonal


def low_rank(matrix: Tensor, rank: int, covariance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-r factors up (M,r) and down (r,N) of `matrix` (M,N), and all its singular values.

    With W = U S V^T: up = U_r, down = S_r V_r^T (X-EcoMLA, arXiv 2503.11132, puts the singular values there), the
    closest product of that rank. Given the covariance C (N,N) of its inputs, the product whose outputs are closest:
    with C = L L^T and W L = U S V^T, up = U_r and down = S_r V_r^T L^-1 (CARE, ICLR 2026); C = I gives the former.
    """
    matrix, L = _weighted(matrix, covariance)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    up, down = U[:, :rank], S[:rank, None] * Vh[:rank]
    if L is not None:
        down = torch.linalg.solve_triangular(L, down, upper=False, left=False)
    return up.cpu(), down.cpu(), S.cpu()


def singular_values(matrix: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Those that `low_rank` cuts."""
    return torch.linalg.svdvals(_weighted(matrix, covariance)[0]).cpu()


def energy_kept(singular: Tensor, rank: int) -> float:
    """The share of the squared singular values that the first `rank` hold."""
    energy = singular.double().square()
    return (energy[:rank].sum() / energy.sum()).item()


def rank_for_energy(singular: Tensor, share: float) -> int:
    """The least rank whose energy passes `share`, rounded up to a multiple of 8 (X-EcoMLA's dynamic rank)."""
    energy = singular.double().square().cumsum(0)
    rank = int((energy < share * energy[-1]).sum()) + 1
    return min(-(-rank // 8) * 8, len(singular))


def _weighted(matrix: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`matrix` @ L and L, on the GPU where there is one."""
    device = compute_device()
    matrix = matrix.to(device)
    if covariance is None:
        return matrix, None
    L = cholesky(covariance.to(device))
    return matrix @ L, L


def cholesky(covariance: Tensor) -> Tensor:
    """L of C + damping = L L^T; the damping, DAMPING of the mean diagonal, grows tenfold until that is positive."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    damping = DAMPING * covariance.diagonal().mean()
    while True:
        L, failed = torch.linalg.cholesky_ex(covariance + damping * identity)
        if not failed:
            return L
        damping = damping * 10
