"""The best choice for each item under a budget of bytes: a multiple-choice knapsack, solved to proven optimality.

Knows nothing of models. The integer programme goes to HiGHS through scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gori.errors import GoriError


@dataclass(frozen=True)
class Option:
    """One way to hold an item."""

    size_bytes: int
    cost: float
    """What it loses; costs of items add."""


def assign(items: Sequence[Sequence[Option]], budget_bytes: int) -> list[int]:
    """For each item the number of its option, so that the sum of costs is the least that `budget_bytes` allows.

    Raises GoriError where even the smallest options exceed the budget.
    """
    least = sum(min(o.size_bytes for o in options) for options in items)
    if least > budget_bytes:
        raise GoriError(
            f"a budget of {budget_bytes:,} bytes holds no choice: the smallest ones are {least:,} bytes together; "
            "raise the budget or allow schemes of fewer bits"
        )
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    costs = np.array([o.cost for options in items for o in options])
    sizes = np.array([float(o.size_bytes) for options in items for o in options])
    owner = np.repeat(np.arange(len(items)), [len(options) for options in items])
    one_each = LinearConstraint((owner == np.arange(len(items))[:, None]).astype(float), 1, 1)  # type: ignore[arg-type]
    # HiGHS holds constraints to 1e-6 of their own unit: bytes over the budget become shares of it
    fits = LinearConstraint(sizes[None] / budget_bytes, -np.inf, 1)
    # costs are spread over magnitudes and HiGHS stops at absolute gaps: the largest becomes a million
    unit = 1e6 / max(costs.max(), 1e-300)
    found = milp(
        costs * unit,
        constraints=[one_each, fits],
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0, found.message  # feasible and bounded: shown above
    taken = np.flatnonzero(found.x > 0.5)
    assert len(taken) == len(items)
    assert sizes[taken].sum() <= budget_bytes
    starts = np.searchsorted(owner, np.arange(len(items)))
    return [int(t - s) for t, s in zip(taken, starts, strict=True)]
