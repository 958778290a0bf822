"""Four-bit weights for a teacher of transformers' that would not fit otherwise: groups of 32, symmetric, two a byte.

torchao 0.18 keeps four-bit values in a byte each on a CPU, refuses stacks of experts, and its Int4WeightOnly needs a
GPU; so the packing is done here, for linear layers and expert stacks alike. Knows nothing of which teacher it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori.errors import GoriError

GROUP = 32


class Packed(nn.Module):
    """A matrix `[out, in]` or a stack `[E, out, in]`; a stack's matrix is unpacked when it is indexed."""

    packed: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        groups = weight.detach().float().unflatten(-1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-12).to(weight.dtype)
        q = (groups / scale.float()).round().clamp(-8, 7).to(torch.int8).flatten(-2)
        self.register_buffer("packed", (q[..., ::2] & 15 | q[..., 1::2] << 4).to(torch.uint8))
        self.register_buffer("scale", scale.squeeze(-1))

    def forward(self) -> Tensor:
        """The whole as it is computed with."""
        return self._unpacked(self.packed, self.scale)

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self._unpacked(self.packed[expert], self.scale[expert])

    @staticmethod
    def _unpacked(packed: Tensor, scale: Tensor) -> Tensor:
        signed = packed.view(torch.int8)
        q = torch.stack((signed << 4 >> 4, signed >> 4), dim=-1).flatten(-2)
        return (q.unflatten(-1, (-1, GROUP)).to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2)


class PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = Packed(linear.weight), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def to_four_bits(model: nn.Module) -> None:
    """Pack every linear layer but the head, and every stack of experts, in place. GoriError where nothing was packed or
    a width is no multiple of 32."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    done = 0
    for name, module in list(model.named_modules()):
        for child, part in list(module.named_children()):
            if isinstance(part, nn.Linear) and part is not head:
                _check(part.weight, f"{name}.{child}")
                setattr(module, child, PackedLinear(part))
                done += 1
        for key, p in list(module._parameters.items()):
            if p is not None and p.dim() == 3 and name.endswith("experts"):
                _check(p, f"{name}.{key}")
                del module._parameters[key]
                module.add_module(key, Packed(p))
                done += 1
    if not done:
        raise GoriError(f"{type(model).__name__} has no linear layer that could be packed: use --bits 16")


def _check(weight: Tensor, name: str) -> None:
    if weight.shape[-1] % GROUP:
        raise GoriError(f"{name} has {weight.shape[-1]} columns, no multiple of {GROUP}: use --bits 16")
