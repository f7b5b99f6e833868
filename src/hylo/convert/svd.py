"""The low-rank factorisation behind every MLA initialisation."""

import torch
from torch import Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation up @ down of `matrix` (M,N): up (M,r) orthonormal, down (r,N) carries the scale.

    With matrix = U S V^T: up = U_r, down = S_r V_r^T (X-EcoMLA, arXiv 2503.11132, puts the singular values there).
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank], S[:rank, None] * Vh[:rank]
