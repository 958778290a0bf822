"""GPTQ: integers chosen one input after the other, each error passed on to the inputs that are still free.

Frantar et al., arXiv 2210.17323, with act-order, damping and blocks; then coordinate descent over the integers
(QuantEase, arXiv 2309.01885) and a least-squares fit of the scales to them. Blocks are met in order: a layer's target
is what the float model computes, its input what the quantized layers before it give (GPTAQ, arXiv 2504.02692).
Shapes in names: O outputs, I inputs, G groups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gori import console
from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize.blocks import SITES, Stream, blocks, kept, linear, weight_name
from gori.quantize.calibration import Batch
from gori.quantize.layout import weight_of
from gori.quantize.rtn import portable, round_to_nearest
from gori.quantized import (
    EMBEDDING,
    HEAD,
    Quantization,
    QuantizedLinear,
    QuantizedTensor,
    TensorScheme,
    quantize_activations,
)

SEARCH = tuple(0.6 + 0.025 * i for i in range(21))
"""Scales that are tried for a group, as multiples of the one that just holds its largest weight."""


class Moments:
    """Second moments of a site's inputs: `H_II = Σ x̂ x̂ᵀ` of what the quantized model gives, and `C_II = Σ (x - x̂) x̂ᵀ`,
    by how much the float model's inputs x differ."""

    def __init__(self, inputs: int) -> None:
        self.H_II = torch.zeros(inputs, inputs)
        self.C_II = torch.zeros(inputs, inputs)

    def add(self, x_NI: Tensor, given_NI: Tensor) -> None:
        """Rows of the float model's inputs and of the quantized one's, float32."""
        self.H_II.addmm_(given_NI.mT, given_NI)
        self.C_II.addmm_((x_NI - given_NI).mT, given_NI)


def damped(H_II: Tensor, damping: float) -> Tensor:
    """H with `damping` times its mean diagonal added: an input that was never active keeps its nearest integers."""
    mean = float(H_II.diagonal().mean())
    return H_II + torch.eye(len(H_II), dtype=H_II.dtype) * (damping * mean if mean > 0 else 1.0)


def target(W_OI: Tensor, m: Moments, damping: float) -> Tensor:
    """The float weight that gives, on the quantized model's inputs, what W gives on the float model's, by least
    squares: `W + W C H⁻¹`."""
    H = damped(m.H_II, damping).double()
    return W_OI + torch.linalg.solve(H, (W_OI @ m.C_II).double(), left=False).float()


def searched_scale(W_OI: Tensor, H_II: Tensor, s: TensorScheme) -> Tensor:
    """Portable scales `[O, G]` with the least `Σ H_jj (w_j - ŵ_j)²` of those tried, for nearest integers."""
    out, width = W_OI.shape
    group, high = s.group_size or width, 2 ** (s.bits - 1) - 1
    W_OGi, weight_Gi = W_OI.view(out, -1, group), H_II.diagonal().view(-1, group)
    holding = W_OGi.abs().amax(-1) / (high + 0.5)
    best, least = portable(holding), torch.full(holding.shape, torch.inf)
    for factor in SEARCH:
        tried = portable(holding * factor)
        q = (W_OGi / tried.unsqueeze(-1)).round_().clamp_(-high - 1, high)
        error = ((q * tried.unsqueeze(-1) - W_OGi).square_() * weight_Gi).sum(-1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def per_input(scale_OG: Tensor, width: int) -> Tensor:
    """Each input's scale `[O, I]`."""
    return scale_OG.repeat_interleave(width // scale_OG.shape[1], dim=1)


def compensated(
    W_OI: Tensor, H_II: Tensor, scale_OI: Tensor, bits: int, *, act_order: bool = True, block: int = 128
) -> Tensor:
    """GPTQ's integers (as floats) for given scales: algorithm 1 of the paper, the inputs with the largest H_jj first.
    H must be positive definite."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    width = W_OI.shape[1]
    order = H_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width)
    H = H_II[order][:, order].double()
    U_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).float()
    W, S = W_OI[:, order].clone(), scale_OI[:, order]
    Q = torch.empty_like(W)
    for start in range(0, width, block):
        end = min(start + block, width)
        part, error = W[:, start:end], torch.empty(len(W), end - start)
        for j in range(start, end):
            i = j - start
            Q[:, j] = (part[:, i] / S[:, j]).round().clamp(low, high)
            error[:, i] = (part[:, i] - Q[:, j] * S[:, j]) / U_II[j, j]
            part[:, i + 1 :].addr_(error[:, i], U_II[j, j + 1 : end], alpha=-1)
        W[:, end:].addmm_(error, U_II[start:end, end:], alpha=-1)
    return Q[:, order.argsort()]


def descended(Q_OI: Tensor, W_OI: Tensor, H_II: Tensor, scale_OI: Tensor, bits: int, *, block: int = 128) -> Tensor:
    """One pass of coordinate descent on `tr (W - Ŵ) H (W - Ŵ)ᵀ`: each input's integers become the best ones for all the
    others as they are, so that the error never grows."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    Q = Q_OI.clone()
    gradient = (Q * scale_OI - W_OI) @ H_II
    for start in range(0, Q.shape[1], block):
        end = min(start + block, Q.shape[1])
        part, H = gradient[:, start:end].clone(), H_II[start:end, start:end]
        change = torch.empty_like(part)
        for j in range(start, end):
            i, s = j - start, scale_OI[:, j]
            new = (Q[:, j] - part[:, i] / (H[i, i] * s)).round_().clamp_(low, high)
            change[:, i] = (new - Q[:, j]) * s
            Q[:, j] = new
            part.addr_(change[:, i], H[i])
        gradient.addmm_(change, H_II[start:end])
    return Q


def fitted_scale(Q_OI: Tensor, W_OI: Tensor, H_II: Tensor, scale_OG: Tensor) -> Tensor:
    """Portable scales that minimise `tr (W - Ŵ) H (W - Ŵ)ᵀ` for given integers: for each output G normal equations.
    Where they ask for a scale that is not positive, the old one stays."""
    out, width = Q_OI.shape
    groups = scale_OG.shape[1]
    Q_OGi = Q_OI.view(out, groups, -1)
    b_OG = ((W_OI @ H_II).view(out, groups, -1) * Q_OGi).sum(-1)
    A_OGG = torch.empty(out, groups, groups)
    for g in range(groups):
        rows = H_II.view(groups, width // groups, width)[g]
        A_OGG[:, g] = ((Q_OGi[:, g] @ rows).view(out, groups, -1) * Q_OGi).sum(-1)
    A_OGG.diagonal(dim1=1, dim2=2).add_(1e-6 * A_OGG.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-20)
    found = torch.linalg.solve(A_OGG.double(), b_OG.double()).float()
    return portable(torch.where((found > 0) & found.isfinite(), found, scale_OG))


def loss(Q_OI: Tensor, scale_OI: Tensor, W_OI: Tensor, H_II: Tensor) -> float:
    """`tr (W - Ŵ) H (W - Ŵ)ᵀ`, what all of the above make small."""
    D = (Q_OI * scale_OI - W_OI).double()
    return float(((D @ H_II.double()) * D).sum())


def solve(
    W_OI: Tensor,
    H_II: Tensor,
    s: TensorScheme,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    rounds: int = 2,
) -> QuantizedTensor:
    """Integers and portable scales of one weight that make `tr (W - Ŵ) H (W - Ŵ)ᵀ` small, float32 `[out, in]`.

    `rounds` times scales are fitted to the integers and the integers descend again; the best of all is kept. 0 is GPTQ
    alone. Raises GoriError where W is not finite.
    """
    if not torch.isfinite(W_OI).all():
        raise GoriError(
            "a weight holds NaN or infinity: its training diverged; lower the learning rate and train again"
        )
    H, width = damped(H_II, damping), W_OI.shape[1]
    scale = searched_scale(W_OI, H, s)
    Q = compensated(W_OI, H, per_input(scale, width), s.bits, act_order=act_order, block=block)
    best = (loss(Q, per_input(scale, width), W_OI, H), Q, scale)
    for _ in range(rounds):
        scale = fitted_scale(Q, W_OI, H, scale)
        Q = descended(Q, W_OI, H, per_input(scale, width), s.bits, block=block)
        now = loss(Q, per_input(scale, width), W_OI, H)
        if now < best[0]:
            best = (now, Q, scale)
    return QuantizedTensor(best[1].to(torch.int8), best[2], s)


def rounded(x: Tensor, s: TensorScheme) -> Tensor:
    """A linear's input as its scheme gives it to the weights."""
    return quantize_activations(x) if s.activation_bits == 8 else x


@torch.no_grad()
def gptq(
    model: Decoder,
    batches: Sequence[Batch],
    spec: Quantization,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    rounds: int = 2,
    asymmetric: bool = True,
    on_disk: Path | None = None,
) -> dict[str, QuantizedTensor]:
    """Integers and scales of every weight of a layout, from calibration batches.

    One block's float weights are copied at a time; activations (twice: float and quantized) lie in memory or, with
    `on_disk`, in mapped files. `asymmetric=False` takes the quantized model's inputs for the float model's too.
    """
    how = {"damping": damping, "act_order": act_order, "block": block, "rounds": rounds}
    done: dict[str, QuantizedTensor] = {}
    if EMBEDDING in spec.tensors:
        done[EMBEDDING] = round_to_nearest(weight_of(model, EMBEDDING), spec.tensors[EMBEDDING], EMBEDDING, SEARCH)
    with kept(on_disk) as place, console.steps("gptq", len(model.layers)) as bar:
        plain, given = Stream(model, batches, place), Stream(model, batches, place)
        if EMBEDDING in done:
            table = done[EMBEDDING].dequantize()
            given.residual = [place.keep(table[b.ids_BT]) for b in batches]
        for layer, block_ in enumerate(blocks(model)):
            quantized = copy.deepcopy(block_)
            for site, names in enumerate(SITES):
                plain.advance(block_, site)
                given.advance(quantized, site)
                first = spec.tensors.get(weight_name(layer, names[0]))
                moments = _moments(plain, given, batches, first)
                for name in names:
                    key = weight_name(layer, name)
                    if key not in spec.tensors:
                        continue
                    old = linear(block_, name)
                    W = target(old.weight, moments, damping) if asymmetric else old.weight
                    done[key] = solve(W, moments.H_II, spec.tensors[key], **how)
                    parent, _, leaf = name.rpartition(".")
                    setattr(quantized.get_submodule(parent), leaf, QuantizedLinear(done[key], old.bias))
            plain.leave(block_)
            given.leave(quantized)
            bar.update(layer + 1, "")
        if HEAD in spec.tensors:
            done[HEAD] = _head(model, plain, given, batches, spec.tensors[HEAD], asymmetric, how)
    return done


def _moments(plain: Stream, given: Stream, batches: Sequence[Batch], s: TensorScheme | None) -> Moments:
    m = Moments(plain.inputs[0].shape[-1])
    for x, g, b in zip(plain.inputs, given.inputs, batches, strict=True):
        g = g[b.valid_BT]
        m.add(x[b.valid_BT], rounded(g, s) if s else g)
    return m


def _head(
    model: Decoder, plain: Stream, given: Stream, batches: Sequence[Batch], s: TensorScheme, asymmetric: bool, how: dict
) -> QuantizedTensor:
    """The head apart, on the hidden states from which something is said."""
    W = weight_of(model, HEAD)
    m = Moments(W.shape[1])
    for x, g, b in zip(plain.residual, given.residual, batches, strict=True):
        m.add(model.norm(x[b.answer_BT]), rounded(model.norm(g[b.answer_BT]), s))
    return solve(target(W, m, how["damping"]) if asymmetric else W, m.H_II, s, **how)
