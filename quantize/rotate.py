"""Rotations folded into weights: the residual stream and the value heads in another orthogonal basis, where no single
channel is far larger than the others.

QuaRot (arXiv 2404.00456) and SpinQuant's R1 and R2 (arXiv 2405.16406), those parts that leave nothing to compute at run
time. Knows nothing of calibration or rounding. Shapes in names: D model width, d head width,
n the size of a rotation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gori.model import Block, Decoder
from gori.norm import RMSNorm
from gori.quantize.blocks import SITES, linear
from gori.quantize.fold import copied, untie

ROWS = 4096
"""Rows of a weight that are turned at a time: a large table is never held in float64 as a whole."""


def is_prime(n: int) -> bool:
    """By trial division: n is a layer's width at most."""
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of an order that 4 divides by Paley's first or second construction (1933) over a prime field,
    float64 of ±1; None where order - 1 is no prime of the form 4k + 3 and order / 2 - 1 none of the form 4k + 1."""
    first, second = order - 1, order // 2 - 1
    if is_prime(first) and first % 4 == 3:
        core = bordered(first, -1.0)
        return core + torch.eye(order, dtype=torch.float64)
    if is_prime(second) and second % 4 == 1:
        core = bordered(second, 1.0)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, one) + torch.kron(torch.eye(order // 2, dtype=torch.float64), zero)
    return None


def bordered(q: int, left: float) -> Tensor:
    """Paley's conference matrix of order q + 1: quadratic characters of row - column, with a border of ones at the top
    and of `left` at the left, and zeros on the diagonal."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    at = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, left
    matrix[1:, 1:] = character[(at.unsqueeze(1) - at.unsqueeze(0)) % q]
    return matrix


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64 of ±1: Sylvester's doubling of the smallest of 1 and Paley's orders that reaches it;
    None where none of these does (an order that 4 does not divide, and a few others, as 92)."""
    core, doublings = order, 0
    while core % 2 == 0:
        core, doublings = core // 2, doublings + 1
    matrix = torch.ones(1, 1, dtype=torch.float64) if core == 1 else None
    for used in range(2, doublings + 1):
        if matrix is None and (matrix := paley(core << used)) is not None:
            doublings -= used
    if matrix is None:
        return None
    for _ in range(doublings):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 `[size, size]`: random signs, then a Hadamard matrix, so that every input
    reaches every output with the same weight. Where `hadamard` knows none: that of the largest power of two dividing
    the size, ⊗ a random orthogonal matrix of the rest (QR of normal numbers)."""
    matrix = hadamard(size)
    if matrix is None:
        power = size & -size
        normal = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
        doubled = hadamard(power)
        assert doubled is not None
        rest = torch.linalg.qr(normal)[0].contiguous() * (size // power) ** 0.5
        matrix = torch.kron(doubled, rest)
    signs = torch.randint(0, 2, (size, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * matrix / size**0.5


def turn_inputs(reader: nn.Module, R_nn: Tensor) -> None:
    """The weight `[..., I]` that gives for turned inputs what the old one gave, in place: each n inputs in a row are
    turned by R (x R), so each n columns become W R; of a table, the entries of its rows."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    for rows in weight.split(ROWS):
        rows.copy_((rows.double().unflatten(-1, (-1, len(R_nn))) @ R_nn).flatten(-2))


def turn_outputs(writer: nn.Linear, R_nn: Tensor) -> None:
    """The weight and bias that give each n outputs in a row turned by R (y R), in place: each n rows become Rᵀ W."""
    for weight in (writer.weight, *([] if writer.bias is None else [writer.bias.unsqueeze(1)])):
        weight.copy_((R_nn.mT @ weight.double().unflatten(0, (-1, len(R_nn)))).flatten(0, 1))


def empty_norm(norm: RMSNorm, readers: list[nn.Linear]) -> None:
    """Move a norm's weight into the columns of what reads it, in place: the norm alone then commutes with rotations."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)


@torch.no_grad()
def rotate(model: Decoder, *, seed: int = 0) -> Decoder:
    """A new decoder of the same function and modules, its residual stream in a random orthogonal basis (`rotation`) and
    each layer's value heads in one of their own; products in float64.

    All norms but qwen3's on queries and keys have weight 1 afterwards. A tied model comes out untied: the final norm's
    weight and not only the rotation goes into the head, which costs the bytes of one more table. Raises GoriError for a
    mixture of experts.
    """
    new, generator = copied(model), torch.Generator().manual_seed(seed)
    head, R_DD = untie(new), rotation(new.cfg.hidden_size, generator)
    empty_norm(new.norm, [head])
    turn_inputs(head, R_DD)
    turn_inputs(new.embed_tokens, R_DD)
    for block in new.layers:
        assert isinstance(block, Block)
        for site, norm in ((0, block.input_layernorm), (2, block.post_attention_layernorm)):
            readers = [linear(block, name) for name in SITES[site]]
            empty_norm(norm, readers)
            for reader in readers:
                turn_inputs(reader, R_DD)
        for site in (1, 3):
            turn_outputs(linear(block, SITES[site][0]), R_DD)
        R_dd = rotation(new.cfg.head_dim, generator)
        turn_outputs(linear(block, "self_attn.v_proj"), R_dd)
        turn_inputs(linear(block, "self_attn.o_proj"), R_dd)
    return new
