"""First weights that can already copy: a previous-token head in layer 0 and induction heads in layer 1.

A slot value must be copied out of the utterance, and a small decoder with random weights finds the circuit for that late
(induction heads: arXiv 2209.11895). The circuit is known, so it is written down as a start, as mimetic initialisation does
with other structure (arXiv 2305.09828). Only values of ordinary weights change: the format and the network stay what they
are, and training is free to undo it. docs/training.md has what it gains.

How it works. Every embedding gets a common part c (to a tied head it adds one number to all logits, which a softmax does not
see). Head 0 of layer 0 turns c into a key, and into a query that RoPE rotates onto the key one position back: it attends to
the previous token and writes that token's content, rotated by R, beside the current one's. Layer 1 asks with its content
A e_t for keys A R^T x_s: they match where s follows an earlier t. What stands there is written with A'^T A', which is its own
embedding again: the head predicts what followed last time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gori.errors import GoriError
from gori.model import Attention, Decoder

PREVIOUS_WRITES, INDUCTION_WRITES = 0.1, 0.4
"""How strongly the two kinds of heads write. 0.04 / 0.1 … 0.16 / 0.6 were tried; all learn, these quickly."""
GAIN = 1.5
"""qk-norm gains of the two layers; 1 leaves attention too soft to pick one token of thirty."""
PAIRS = 3
"""RoPE's fastest pairs, which tell one position from the next."""


@torch.no_grad()
def start_with_induction(model: Decoder, generator: torch.Generator) -> Decoder:
    """Write the circuit into a decoder that `Decoder.initialise` filled, in place; returns it."""
    cfg = model.cfg
    if cfg.layers < 2:
        raise GoriError(f"induction needs 2 layers and the model has {cfg.layers}: add one or set induction: false")
    D, K = cfg.hidden_size, cfg.kv_heads * cfg.head_dim
    common = torch.randn(D, generator=generator)
    common /= common.norm()
    other = torch.eye(D) - torch.outer(common, common)  # projects the common part out
    table = model.embed_tokens.weight
    assert isinstance(table, Tensor)
    table.copy_(table @ other + common * cfg.init_std * math.sqrt(D))
    turn = other @ _orthogonal(D, D, generator) @ other
    _previous_token(model.layers[0].self_attn, model.rope_freq, common, other, turn, generator)  # type: ignore[arg-type]
    _induction(model.layers[1].self_attn, _orthogonal(K, D, generator) @ other, turn, other, generator)  # type: ignore[arg-type]
    return model


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix `[rows, columns]` cut from an orthogonal one."""
    size = max(rows, columns)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0][:rows, :columns]


def _previous_token(
    a: Attention, rope_freq: Tensor, common: Tensor, other: Tensor, turn: Tensor, generator: torch.Generator
) -> None:
    """The first key/value group attends one position back and writes what stands there, turned."""
    d, per = a.cfg.head_dim, a.cfg.heads // a.cfg.kv_heads
    pairs = torch.arange(min(PAIRS, d // 2))
    key, query = torch.zeros(d), torch.zeros(d)
    key[pairs] = 1.0
    query[pairs], query[pairs + d // 2] = rope_freq[pairs].cos(), -rope_freq[pairs].sin()
    if not a.cfg.qk_norm:
        # the common part of a normed input has length sqrt(D/2): bring the score to what qk-norm would give
        peak = GAIN * math.sqrt(d) / (len(pairs) * a.cfg.hidden_size / 2 / math.sqrt(d)) * GAIN
        key, query = key * math.sqrt(peak), query * math.sqrt(peak)
    value = _orthogonal(d, a.cfg.hidden_size, generator) @ other
    a.k_proj.weight[:d] += torch.outer(key, common)
    a.v_proj.weight[:d] = value
    for h in range(per):
        rows = slice(h * d, (h + 1) * d)
        a.q_proj.weight[rows] += torch.outer(query, common)
        a.o_proj.weight[:, rows] = PREVIOUS_WRITES / per * (turn @ value.T)
    _gain(a)


def _induction(a: Attention, read: Tensor, turn: Tensor, other: Tensor, generator: torch.Generator) -> None:
    """Every head matches its content with what stood before, and writes what it finds as itself."""
    d, per, D = a.cfg.head_dim, a.cfg.heads // a.cfg.kv_heads, a.cfg.hidden_size
    scale = 0.1 if a.cfg.qk_norm else GAIN * math.sqrt(d) / math.sqrt(D / 2 * min(1.0, len(read) / D))

    def per_head(rows: Tensor) -> Tensor:
        return rows.view(a.cfg.kv_heads, 1, d, D).expand(-1, per, -1, -1).reshape(-1, D)

    value = _orthogonal(len(read), D, generator) @ other
    a.q_proj.weight.copy_(per_head(read) * scale)
    a.k_proj.weight.copy_(read @ turn.T * scale)
    a.v_proj.weight.copy_(value)
    a.o_proj.weight.copy_(per_head(value).T * (INDUCTION_WRITES / per))
    _gain(a)


def _gain(a: Attention) -> None:
    if a.cfg.qk_norm:
        a.q_norm.weight.fill_(GAIN)
        a.k_norm.weight.fill_(GAIN)
