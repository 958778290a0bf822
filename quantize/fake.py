"""Weights that are rounded in the forward pass and learn in the backward pass: what tune and qat put into a decoder.

A weight is integers times scales. The scales learn as logarithms, so that they stay positive, and are made portable in
every forward pass. The integers are fixed (int8), or the nearest ones to latents: floats in units of their scale, which
learn too. Gradients pass straight through both roundings (Bengio et al., arXiv 1308.3432). Knows nothing of losses,
data or optimisers. Shapes in names: O outputs, I inputs, G groups, N positions, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gori.model import Decoder
from gori.quantize.blocks import SITES
from gori.quantize.rtn import portable
from gori.quantized import EMBEDDING, HEAD, Quantization, QuantizedTensor, TensorScheme, quantize_activations

LEAST, MOST = math.log(2.0**-14), math.log(65280.0)
"""Logarithms of the portable scales' range."""


def integers(w_OI: Tensor, bits: int) -> Tensor:
    """The integers, as floats, of int8 integers or of latents in units of the scale."""
    if not w_OI.is_floating_point():
        return w_OI.float()
    return w_OI.round().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def times_scale(q_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """The product that QuantizedTensor.dequantize forms, in place."""
    out, width = q_OI.shape
    return q_OI.view(out, scale_OG.shape[1], -1).mul_(scale_OG.unsqueeze(-1)).view(out, width)


def scale_of(log_OG: Tensor) -> Tensor:
    """The portable scale next to the exponential."""
    return portable(log_OG.exp()).to(log_OG.dtype)


def pulled(grad_OI: Tensor, w_OI: Tensor, log_OG: Tensor, bits: int) -> tuple[Tensor | None, Tensor]:
    """The gradient of a dequantized weight, for the latents (None for fixed integers) and for the scales' logarithms.

    With `ŵ = s q`: `dŵ/du = s` as though q were u, and `dŵ/dlog s = s q` as though portable(s) were s. A latent beyond
    the outermost integers' cells gets none, as its integer does not follow it.
    """
    scale_OG1, shape = scale_of(log_OG).unsqueeze(-1), (*log_OG.shape, -1)
    grad_OGi = grad_OI.reshape(shape) * scale_OG1
    grad_log_OG = (grad_OGi * integers(w_OI, bits).view(shape)).sum(-1).to(log_OG.dtype)
    if not w_OI.is_floating_point():
        return None, grad_log_OG
    high = 2 ** (bits - 1)
    beyond = (w_OI < -high - 0.5) | (w_OI > high - 0.5)
    return grad_OGi.view_as(w_OI).masked_fill_(beyond, 0), grad_log_OG


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, log_OG: Tensor, bits: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w_OI, log_OG)
        ctx.bits = bits
        return times_scale(integers(w_OI, bits), scale_of(log_OG))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w_OI, log_OG = ctx.saved_tensors
        return *pulled(grad, w_OI, log_OG, ctx.bits), None


class _Linear(torch.autograd.Function):
    """x Ŵᵀ + b. The float weight is formed again in the backward pass, so that none waits between the two."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w_OI: Tensor, log_OG: Tensor, bias: Tensor | None, bits: int
    ) -> Tensor:
        ctx.save_for_backward(x, w_OI, log_OG)
        ctx.bits, ctx.biased = bits, bias is not None
        return F.linear(x, times_scale(integers(w_OI, bits), scale_of(log_OG)), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_OI, log_OG = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ times_scale(integers(w_OI, ctx.bits), scale_of(log_OG))
        grad_w, grad_log = pulled(flat.mT @ x.reshape(-1, x.shape[-1]), w_OI, log_OG, ctx.bits)
        return grad_x, grad_w, grad_log, flat.sum(0) if ctx.biased else None, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return quantize_activations(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Rounding:
    """quantize_activations with gradients straight through; linears with one input in common round it once."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor, activation_bits: int) -> Tensor:
        if activation_bits != 8:
            return x
        if self._seen is not x or self._rounded is None:
            self._seen, self._rounded = x, _Round.apply(x)
        assert self._rounded is not None
        return self._rounded

    def forget(self) -> None:
        """Let go of the last input, which holds a whole forward pass's graph."""
        self._seen = self._rounded = None


class Weight(nn.Module):
    """Integers (int8, fixed) or latents (float32, in units of the scale) `[O, I]`, and log scales `[O, G]`."""

    def __init__(self, w_OI: Tensor, log_OG: Tensor, scheme: TensorScheme) -> None:
        super().__init__()
        self.scheme, self.learns = scheme, w_OI.is_floating_point()
        self.w_OI = nn.Parameter(w_OI, requires_grad=self.learns)
        self.log_OG = nn.Parameter(log_OG)

    def dequantized(self) -> Tensor:
        """float32 `[O, I]`, with gradients for what learns."""
        return _Dequantize.apply(self.w_OI, self.log_OG, self.scheme.bits)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[..., I]` of the dequantized weight, formed without the others."""
        flat = ids.flatten()
        w_NI = F.embedding(flat, self.w_OI) if self.learns else self.w_OI[flat]
        rows_NI = _Dequantize.apply(w_NI, F.embedding(flat, self.log_OG), self.scheme.bits)
        return rows_NI.view(*ids.shape, -1)

    @torch.no_grad()
    def project(self) -> None:
        """Bring latents back into their integers' cells and scales into the portable range: beyond, neither has any
        effect, and a latent that went far would be long in coming back."""
        self.log_OG.clamp_(LEAST, MOST)
        if self.learns:
            high = 2 ** (self.scheme.bits - 1)
            self.w_OI.clamp_(-high - 0.5, high - 0.5)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The integers and portable scales that the forward pass multiplies."""
        q_OI = integers(self.w_OI, self.scheme.bits).to(torch.int8)
        return QuantizedTensor(q_OI, scale_of(self.log_OG).clone(), self.scheme)


class FakeLinear(nn.Module):
    """A linear that computes what QuantizedLinear does, bit for bit, and learns."""

    def __init__(self, held: Weight, bias: nn.Parameter | None, rounding: Rounding) -> None:
        super().__init__()
        self.held, self.bias, self.rounding = held, bias, rounding

    def rounded(self, x: Tensor) -> Tensor:
        return self.rounding(x, self.held.scheme.activation_bits)

    @property
    def weight(self) -> Tensor:
        return self.held.dequantized()

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(self.rounded(x), self.held.w_OI, self.held.log_OG, self.bias, self.held.scheme.bits)


class FakeTable(nn.Module):
    """A table that computes what QuantizedEmbedding does, bit for bit, and learns; as a tied head it is one weight."""

    def __init__(self, held: Weight, head_activation_bits: int) -> None:
        super().__init__()
        self.held, self.head_activation_bits, self.rounding = held, head_activation_bits, Rounding()

    def rounded(self, hidden: Tensor) -> Tensor:
        return self.rounding(hidden, self.head_activation_bits)

    @property
    def weight(self) -> Tensor:
        return self.held.dequantized()

    def forward(self, ids: Tensor) -> Tensor:
        return self.held.rows(ids)

    def as_head(self, hidden: Tensor) -> Tensor:
        return F.linear(self.rounded(hidden), self.weight)


def student(model: Decoder, spec: Quantization, weights: Mapping[str, Weight]) -> Decoder:
    """A decoder that shares `model`'s float matrices (frozen), has norms and biases of its own (they learn) and the
    given weights in place of the quantized ones."""
    fake = copy.deepcopy(model, {id(p): p for p in model.parameters() if p.dim() > 1}).eval()
    shared: dict[str, Rounding] = {}
    for name, held in weights.items():
        if name in (EMBEDDING, HEAD):
            continue
        path = name.removeprefix("model.").removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        site = next(f"{path.rsplit('.', 2)[0]}.{i}" for i, leaves in enumerate(SITES) if path.endswith(leaves))
        bias = fake.get_submodule(path).bias
        assert bias is None or isinstance(bias, nn.Parameter)
        linear = FakeLinear(held, bias, shared.setdefault(site, Rounding()))
        setattr(fake.get_submodule(parent), leaf, linear)
    if not spec.shared_head and fake.cfg.tied:
        head = nn.Linear(fake.cfg.hidden_size, fake.cfg.vocab_size, bias=False, device="meta")
        head.weight = fake.embed_tokens.weight  # type: ignore[assignment]
        fake.lm_head, fake.cfg = head, replace(fake.cfg, tied=False)
    if EMBEDDING in weights:
        fake.embed_tokens = FakeTable(weights[EMBEDDING], spec.head_activation_bits)
    if HEAD in weights:
        fake.lm_head = FakeLinear(weights[HEAD], None, Rounding())
    for name, p in fake.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(p.dim() == 1 or ".held." in f".{name}")
    return fake


def forget(fake: Decoder) -> None:
    """Let every rounding go of its last input."""
    for m in fake.modules():
        if isinstance(m, (FakeLinear, FakeTable)):
            m.rounding.forget()


def floats(fake: Decoder) -> dict[str, Tensor]:
    """Copies of the norms and biases, under the names that they have in the float decoder."""
    return {n: p.detach().clone() for n, p in fake.named_parameters() if p.dim() == 1}
