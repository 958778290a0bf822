"""Losses over a large vocabulary, chunk by chunk, so that no [tokens, vocabulary] tensor is ever whole.

The gradient with respect to hidden states and head is formed in the forward pass, from closed forms, and only those two
are kept; nothing is recomputed. Knows nothing of models, nor of what the loss means.

Shapes: N tokens, C tokens of a chunk, D width, V vocabulary. Logits and the sum of the head's gradient: float32
(float64 if given), whatever is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gori.precision import for_products, product_dtype, wide

CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 512 << 20}
"""Size of one [C, V] float32 tensor, of which a few exist. The head's gradient is read and written once a chunk, so a
small chunk costs time."""
WHOLE_BYTES = 1 << 30
"""`cross_entropy` of logits up to this size forms them whole."""

BLOCK_BYTES = 512 << 10
"""Of a chunk, what is worked on at once on a CPU: the passes over it then stay in its second-level cache."""

Work = Callable[..., Tensor]
"""(logits [C, V], other tensors [C, ...]) → each term's sum; the logits become the gradient of the weighted sum, the
others may be overwritten too."""
Known = Callable[[slice], tuple[Tensor, ...]]
"""A chunk's rows → what `Work` takes beside their logits."""


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, work: Work, known: Known, weights: list[float], chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N = len(hidden_ND)
        hidden, head = for_products(hidden_ND), head_VD.to(product_dtype(hidden_ND))  # once, not once a chunk
        grad_hidden = torch.empty_like(hidden_ND)
        grad_head = torch.zeros_like(head_VD, dtype=wide(head_VD.dtype))
        buffer = product_buffer(hidden, head, min(chunk, N))
        sums = torch.zeros(len(weights), dtype=wide(hidden.dtype), device=hidden.device)
        run = _fused(work, hidden.dtype) if compiled else partial(_in_blocks, work)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            found, grad = run(product(hidden[rows], head, buffer), *known(rows))
            sums += found
            grad = grad.to(hidden.dtype)
            grad_hidden[rows] = grad @ head
            _add_product(grad_head, grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.tokens, ctx.head_dtype, terms = N, head_VD.dtype, sums / N
        ctx.mark_non_differentiable(terms)
        return (terms * terms.new_tensor(weights)).sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # in place: a second backward pass would be refused by autograd, which sees that these were changed
        grad_hidden, grad_head = ctx.saved_tensors
        share = grad / ctx.tokens
        return grad_hidden.mul_(share), grad_head.mul_(share).to(ctx.head_dtype), None, None, None, None, None


def chunked(
    hidden_ND: Tensor,
    head_VD: Tensor,
    work: Work,
    known: Known,
    weights: list[float],
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of loss terms, averaged over tokens, and each term's mean `[terms]`, without gradient.

    Gradients flow to hidden states and head once. `chunk` tokens have logits at once (None: `chunk_rows`); `compiled`:
    torch.compile fuses what is done with them.
    """
    chunk = chunk or chunk_rows(head_VD)
    return _Chunked.apply(hidden_ND, head_VD, work, known, weights, chunk, compiled)  # pyright: ignore[reportReturnType]


def chunk_rows(head_VD: Tensor) -> int:
    """Tokens of a chunk on the head's device."""
    return max(1, CHUNK_BYTES.get(head_VD.device.type, CHUNK_BYTES["cpu"]) // (4 * len(head_VD)))


def product_buffer(hidden_ND: Tensor, head_VD: Tensor, rows: int) -> Tensor | None:
    """Memory for a chunk's logits on a CPU, which gives large blocks back to the system each time they are freed; None
    where the product is made in a narrower type or torch keeps freed blocks itself (a GPU)."""
    if hidden_ND.device.type != "cpu" or hidden_ND.dtype not in (torch.float32, torch.float64):
        return None
    return hidden_ND.new_empty(rows, len(head_VD))


def product(hidden_CD: Tensor, head_VD: Tensor, buffer: Tensor | None) -> Tensor:
    """Logits `[C, V]`, in the buffer where there is one; float32 or wider, and never an input's own memory."""
    if buffer is not None:
        return torch.mm(hidden_CD, head_VD.T, out=buffer[: len(hidden_CD)])
    if _widens(hidden_CD):
        return torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32)
    return (hidden_CD @ head_VD.T).to(wide(hidden_CD.dtype))


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """Add a product to a float32 or float64 sum; of narrower factors without rounding it to their type first on a
    GPU, whose matrix units add in float32 anyway."""
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    elif _widens(left_VC):
        torch.addmm(sum_VD, left_VC, right_CD, out=sum_VD, out_dtype=torch.float32)
    else:
        sum_VD += left_VC @ right_CD


def _widens(t: Tensor) -> bool:
    """Whether torch multiplies narrow factors into a float32 result."""
    return t.is_cuda and t.dtype in (torch.bfloat16, torch.float16)


def _in_blocks(work: Work, logits_CV: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """`work` on the blocks of a chunk: its sums, and the logits, which are the gradient then."""
    size = len(logits_CV)
    if logits_CV.device.type == "cpu":
        size = max(1, BLOCK_BYTES // (logits_CV.element_size() * logits_CV.shape[1]))
    blocks = zip(*(t.split(size) for t in (logits_CV, *others)), strict=True)
    return torch.stack([work(*parts) for parts in blocks]).sum(0), logits_CV


@cache
def _fused(work: Work, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """`work` as a few kernels that leave its inputs alone, and return its sums and the gradient in `dtype`; sizes vary
    from chunk to chunk, so none of them is compiled in."""

    def apart(logits_CV: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        own = [t.clone() for t in (logits_CV, *others)]
        return work(*own), own[0].to(dtype)

    return torch.compile(apart, dynamic=True, fullgraph=True)  # else what cannot be compiled runs as it is, unsaid


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, compiled: bool = False) -> Tensor:
    """Mean cross-entropy of the tokens' targets (int64): logits whole where they are small, else `chunked`."""
    if 4 * len(hidden_ND) * len(head_VD) <= WHOLE_BYTES:
        logits_NV = F.linear(hidden_ND, head_VD)
        return F.cross_entropy(logits_NV.to(wide(logits_NV.dtype)), targets_N)
    known = lambda rows: (targets_N[rows],)  # noqa: E731
    return chunked(hidden_ND, head_VD, _cross_entropy, known, [1.0], compiled=compiled)[0]


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    at = targets_C.unsqueeze(1)
    log_CV = F.log_softmax(logits_CV, -1)
    loss = -log_CV.gather(1, at).sum()
    logits_CV.copy_(log_CV.exp_()).scatter_add_(1, at, torch.full_like(logits_CV[:, :1], -1.0))
    return loss.unsqueeze(0)
