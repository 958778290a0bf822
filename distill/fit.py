"""Least squares of what a layer writes: which of its inputs to keep, and the matrix that they are written with.

Knows nothing of modules. All is a function of sums over calibration tokens, which may come a batch at a time.
Shapes in names: N tokens, I inputs (neurons, or what heads found), D width of what is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RIDGE = 1e-3
"""Pull of the fitted matrix to the one it starts from, as a share of the inputs' mean square: what the tokens do not
decide stays as it was."""


class Sums:
    """Second moments of inputs, and their products with what should be written, float64."""

    def __init__(self, inputs: int, width: int) -> None:
        self.gram_II = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross_ID = torch.zeros(inputs, width, dtype=torch.float64)

    def add(self, inputs_NI: Tensor, wanted_ND: Tensor) -> None:
        a = inputs_NI.double()
        self.gram_II += a.T @ a
        self.cross_ID += a.T @ wanted_ND.double()

    def add_products(self, inputs_NI: Tensor, wanted_ND: Tensor) -> None:
        """Where the second moments are known."""
        self.cross_ID += inputs_NI.double().T @ wanted_ND.double()

    def taken(self, rows: Tensor) -> Sums:
        """Of some of the inputs."""
        fewer = Sums(0, 0)
        fewer.gram_II, fewer.cross_ID = self.gram_II[rows][:, rows], self.cross_ID[rows]
        return fewer

    def correction(self) -> Tensor:
        """`[D, I]`: the matrix that writes nearest to what is wanted, pulled to zero by the ridge."""
        diagonal = self.gram_II.diagonal()
        damped = self.gram_II + RIDGE * diagonal.mean().clamp_min(1e-30) * torch.eye(len(diagonal)).double()
        return torch.linalg.solve(damped, self.cross_ID).T


def forward_selection(sums: Sums, count: int) -> Tensor:
    """Indices of `count` inputs, sorted: one by one the one with which least squares on those taken comes nearest to
    what is wanted (orthogonal least squares: Chen, Billings and Luo, International Journal of Control 50(5), 1989;
    for channels of a network ThiNet, arXiv 1707.06342, section 3.2).

    The inputs not taken are kept orthogonal to the taken ones by a Cholesky factor that grows a column a step.
    """
    I = len(sums.gram_II)  # noqa: E741
    diagonal = sums.gram_II.diagonal()
    ridge = RIDGE * diagonal.mean().clamp_min(1e-30)
    left_I, cross_ID = diagonal + ridge, sums.cross_ID.clone()
    factor_IK = torch.zeros(I, count, dtype=torch.float64)
    taken = torch.zeros(I, dtype=torch.bool)
    for k in range(count):
        gain_I = (cross_ID.square().sum(1) / left_I).masked_fill(taken, -1.0)
        j = int(gain_I.argmax())
        taken[j] = True
        root = left_I[j].sqrt()
        column_I = sums.gram_II[:, j] - factor_IK[:, :k] @ factor_IK[j, :k]
        column_I[j] += ridge
        factor_IK[:, k] = column_I / root
        cross_ID -= factor_IK[:, k, None] * (cross_ID[j] / root)
        left_I = (left_I - factor_IK[:, k].square()).clamp_min(ridge)
    return taken.nonzero().flatten()


def block_selection(sums: Sums, size: int, allowed: Callable[[list[int]], Sequence[int]], count: int) -> list[int]:
    """`count` blocks of `size` inputs each, in the order of taking, chosen as single inputs are by `forward_selection`;
    of those taken so far `allowed` says which may come next."""
    gram_II, cross_ID = sums.gram_II.clone(), sums.cross_ID.clone()
    ridge = RIDGE * gram_II.diagonal().mean().clamp_min(1e-30) * torch.eye(size).double()
    chosen: list[int] = []

    def inverse(b: int) -> tuple[slice, Tensor]:
        rows = slice(b * size, (b + 1) * size)
        return rows, torch.linalg.inv(gram_II[rows, rows] + ridge)

    def gain(b: int) -> float:
        rows, inv = inverse(b)
        return float((cross_ID[rows] * (inv @ cross_ID[rows])).sum())

    for _ in range(count):
        best = max(allowed(chosen), key=gain)
        rows, inv = inverse(best)
        carried = gram_II[:, rows] @ inv
        cross_ID -= carried @ cross_ID[rows]
        gram_II -= carried @ gram_II[rows].clone()
        chosen.append(best)
    return chosen


def group_scales(sums: Sums, weight_DI: Tensor, group_I: Tensor) -> Tensor:
    """A factor for each group of inputs (`group_I`, int64 from 0), such that their sum written with `weight_DI` is
    nearest to what is wanted."""
    w = weight_DI.double()
    which_IG = torch.nn.functional.one_hot(group_I).double()
    gram = which_IG.T @ ((w.T @ w) * sums.gram_II) @ which_IG
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram)).double()
    return torch.linalg.solve(gram + ridge, which_IG.T @ (w.T * sums.cross_ID).sum(1)).to(weight_DI.dtype)
