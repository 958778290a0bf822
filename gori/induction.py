"""First weights that can already copy: a previous-token head in layer 0 and induction heads in layer 1.

A slot value must be copied out of the utterance, and a small decoder with random weights finds the circuit for that
late (induction heads: arXiv 2209.11895). The circuit is known, so it is written down as a start, as mimetic
initialisation does with other structure (arXiv 2305.09828). Only values of ordinary weights change: the format and the
network stay what they are, and training is free to undo it. docs/training.md has what it gains.

How it works. Every embedding gets a common part c (to a tied head it adds one number to all logits, which a softmax
does not see). Half of layer 0's heads turn c into a key, and into a query that RoPE rotates onto the key one position
back: they attend to the previous token and write its content V e into a space U of their own. Layer 1 asks with V e_t
for keys U x_s: they match where s follows an earlier t. What stands there, U apart, is written as it is: the head
predicts what followed last time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gori.errors import GoriError
from gori.model import Attention, Decoder, ModelConfig

PREVIOUS_WRITES, INDUCTION_WRITES = 0.05, 0.4
"""How strongly the two kinds of heads write, against an input of root mean square 1."""
GAIN = 1.5
"""qk-norm gains of the two layers; 1 leaves attention too soft to pick one token of thirty."""
PAIRS = 3
"""RoPE's fastest pairs, which tell one position from the next."""


def check_room(cfg: ModelConfig) -> None:
    """GoriError where a decoder is too small for the circuit."""
    if cfg.layers < 2:
        raise GoriError(f"induction needs 2 layers and the model has {cfg.layers}: add one or set induction: false")
    if 2 * cfg.head_dim > cfg.hidden_size:
        raise GoriError(
            f"induction needs a hidden_size of 2 * head_dim = {2 * cfg.head_dim}, got {cfg.hidden_size}: "
            "set induction: false"
        )


@torch.no_grad()
def start_with_induction(model: Decoder, generator: torch.Generator) -> Decoder:
    """Write the circuit into a decoder that `Decoder.initialise` filled, in place; returns it."""
    cfg = model.cfg
    check_room(cfg)
    D, d = cfg.hidden_size, cfg.head_dim
    groups = max(1, min(cfg.kv_heads // 2, (D - 1) // (2 * d)))
    common = torch.randn(D, generator=generator)
    common /= common.norm()
    other = torch.eye(D) - torch.outer(common, common)  # projects the common part out
    table = model.embed_tokens.weight
    assert isinstance(table, Tensor)
    table.copy_(table @ other + common * cfg.init_std * math.sqrt(D))
    content = _orthogonal(D, generator)[: groups * d] @ other
    basis = torch.linalg.qr(torch.cat((common.unsqueeze(1), other @ _orthogonal(D, generator)), dim=1))[0].T[1:D]
    space, rest = basis[: groups * d], basis[groups * d :]
    first, second = model.layers[0].self_attn, model.layers[1].self_attn
    assert isinstance(first, Attention)
    assert isinstance(second, Attention)
    _previous_token(first, model.rope_freq, common, content, space)
    _induction(second, content, space, rest)
    return model


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _previous_token(a: Attention, rope_freq: Tensor, common: Tensor, content: Tensor, space: Tensor) -> None:
    """The first key/value groups attend one position back and write the content there into their space."""
    d, per = a.cfg.head_dim, a.cfg.heads // a.cfg.kv_heads
    pairs = torch.arange(min(PAIRS, d // 2))
    key, query = torch.zeros(d), torch.zeros(d)
    key[pairs] = 1.0
    query[pairs], query[pairs + d // 2] = rope_freq[pairs].cos(), -rope_freq[pairs].sin()
    if not a.cfg.qk_norm:
        # the common part of a normed input has length sqrt(D/2): bring the score to what qk-norm would give
        peak = GAIN**2 * d / (len(pairs) * a.cfg.hidden_size / 2)
        key, query = key * math.sqrt(peak), query * math.sqrt(peak)
    for g in range(len(content) // d):
        rows = slice(g * d, (g + 1) * d)
        a.k_proj.weight[rows] += torch.outer(key, common)
        a.v_proj.weight[rows] = content[rows]
        for h in range(g * per, (g + 1) * per):
            a.q_proj.weight[h * d : (h + 1) * d] += torch.outer(query, common)
            a.o_proj.weight[:, h * d : (h + 1) * d] = PREVIOUS_WRITES / per * space[rows].T
    _gain(a)


def _induction(a: Attention, content: Tensor, space: Tensor, rest: Tensor) -> None:
    """Every head matches its content with what stood before, and writes what it finds as itself."""
    d, per = a.cfg.head_dim, a.cfg.heads // a.cfg.kv_heads
    groups = len(content) // d
    # without qk-norm: a query of |V e| = sqrt(d/2) and a key of at most sqrt(d) make the score GAIN**2 * sqrt(d)
    scale = 0.1 if a.cfg.qk_norm else GAIN * 2**0.25
    for g in range(a.cfg.kv_heads):
        rows, of = slice(g * d, (g + 1) * d), slice(g % groups * d, (g % groups + 1) * d)
        value = rest.roll(-g * d, 0)[:d]  # a narrow model has less than d dimensions to spare
        n = len(value)
        a.k_proj.weight[rows] = space[of] * scale
        a.v_proj.weight[g * d : g * d + n] = value
        for h in range(g * per, (g + 1) * per):
            a.q_proj.weight[h * d : (h + 1) * d] = content[of] * scale
            a.o_proj.weight[:, h * d : h * d + n] = INDUCTION_WRITES / per * value.T
    _gain(a)


def _gain(a: Attention) -> None:
    if a.cfg.qk_norm:
        a.q_norm.weight.fill_(GAIN)
        a.k_norm.weight.fill_(GAIN)
