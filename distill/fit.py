"""Least squares of what a layer writes: which of its inputs to keep, and the matrix that they are written with.

Knows nothing of modules. All is a function of sums over calibration tokens, which may come a batch at a time.
Shapes in names: N tokens, I inputs (neurons, or what heads found), D width of what is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3
"""Pull of the fitted matrix to the one it starts from, as a share of the inputs' mean square: what the tokens do not
decide stays as it was."""

POOL = 4
"""Inputs that a round of selection looks at for each one it takes."""


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


def forward_selection(sums: Sums, count: int, at_once: int | None = None) -> Tensor:
    """Indices of `count` inputs, sorted: one by one the one with which least squares on those taken comes nearest to
    what is wanted (orthogonal least squares: Chen, Billings and Luo, International Journal of Control 50(5), 1989;
    for channels of a network ThiNet, arXiv 1707.06342, section 3.2).

    The inputs not taken are kept orthogonal to the taken ones by a Cholesky factor. It grows by `at_once` columns a
    round, chosen one by one among POOL times as many inputs, those with the largest gains as the round begins: a wide
    layer is then matrix products. With one column the choice is exact. Without `at_once` a round takes the 64th part
    of `count`, at least one.
    """
    I = len(sums.gram_II)  # noqa: E741
    at_once = at_once or max(1, count // 64)
    diagonal = sums.gram_II.diagonal()
    ridge = RIDGE * diagonal.mean().clamp_min(1e-30)
    left_I, cross_ID = diagonal + ridge, sums.cross_ID.clone()
    factor_IK = torch.zeros(I, count, dtype=torch.float64)
    taken = torch.zeros(I, dtype=torch.bool)
    k = 0
    while k < count:
        n = min(at_once, count - k)
        gain_I = (cross_ID.square().sum(1) / left_I).masked_fill(taken, -1.0)
        pool = gain_I.topk(min(POOL * at_once if at_once > 1 else 1, I - k)).indices
        known = factor_IK[pool, :k]
        gram = sums.gram_II[pool][:, pool] - known @ known.T + ridge * torch.eye(len(pool)).double()
        picks, lower, explained_ND = _first_of_pool(gram, cross_ID[pool], n, ridge)
        new = pool[picks]
        taken[new] = True
        columns_IN = sums.gram_II[:, new] - factor_IK[:, :k] @ factor_IK[new, :k].T
        columns_IN[new, torch.arange(n)] += ridge
        factor_IK[:, k : k + n] = torch.linalg.solve_triangular(lower, columns_IN.T, upper=False).T
        cross_ID -= factor_IK[:, k : k + n] @ explained_ND
        left_I = (left_I - factor_IK[:, k : k + n].square().sum(1)).clamp_min(ridge)
        k += n
    return taken.nonzero().flatten()


def _first_of_pool(gram_PP: Tensor, cross_PD: Tensor, count: int, ridge: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """The first `count` of a small pool, one by one; the Cholesky factor of their Gram matrix, `[count, count]`, and
    what each explains that those before it did not, `[count, D]`."""
    left_P, rest_PD = gram_PP.diagonal().clamp_min(ridge), cross_PD.clone()
    factor_PK = torch.zeros(len(gram_PP), count, dtype=torch.float64)
    explained_KD = torch.zeros(count, cross_PD.shape[1], dtype=torch.float64)
    picks: list[int] = []
    for k in range(count):
        gain_P = rest_PD.square().sum(1) / left_P
        gain_P[picks] = -1.0
        j = int(gain_P.argmax())
        picks.append(j)
        root = left_P[j].sqrt()
        factor_PK[:, k] = (gram_PP[:, j] - factor_PK[:, :k] @ factor_PK[j, :k]) / root
        factor_PK[j, k] = root
        explained_KD[k] = rest_PD[j] / root
        rest_PD -= factor_PK[:, k, None] * explained_KD[k]
        left_P = (left_P - factor_PK[:, k].square()).clamp_min(ridge)
    return picks, factor_PK[picks].tril(), explained_KD


def group_scales(sums: Sums, weight_DI: Tensor, group_I: Tensor) -> Tensor:
    """A factor for each group of inputs (`group_I`, int64 from 0), such that their sum written with `weight_DI` is
    nearest to what is wanted."""
    w = weight_DI.double()
    which_IG = torch.nn.functional.one_hot(group_I).double()
    gram = which_IG.T @ ((w.T @ w) * sums.gram_II) @ which_IG
    ridge = 1e-6 * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(gram)).double()
    return torch.linalg.solve(gram + ridge, which_IG.T @ (w.T * sums.cross_ID).sum(1)).to(weight_DI.dtype)
