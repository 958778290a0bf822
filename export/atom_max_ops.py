"""CPU bodies of the `rbln_custom_ops` that an optimum-rbln decoder calls, registered where `rebel` is absent.

Rebellions' own bodies return empty tensors: the compiler replaces the calls. These compute what the calls mean, so that
the same graphs run here. Nothing of gori is imported, so that another environment can load this file alone.

Shapes in names: B sequences, K key/value heads, G query heads that share one, S new tokens of a sequence, d head width,
N cache blocks, P positions of a block, C positions of a sequence's blocks, D model width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMESPACE = "rbln_custom_ops"
_CAUSAL = "Tensor q, Tensor k, Tensor v, Tensor(a!) kcache, Tensor(b!) vcache, Tensor seq, Tensor scale"
_PAGED = f"{_CAUSAL}, Tensor block_table, int block_size"
_TAIL = "Tensor? mask=None, Tensor? s_aux=None"
SCHEMAS = {
    "paged_causal_attn_prefill": f"({_PAGED}, bool is_bidirectional=False, {_TAIL}) -> Tensor",
    "paged_causal_attn_decode": f"({_PAGED}, {_TAIL}) -> Tensor",
    "paged_flash_causal_attn_prefill": f"({_PAGED}, int partition, bool is_bidirectional=False, {_TAIL}) -> Tensor",
    "paged_flash_causal_attn_decode": f"({_PAGED}, int partition, {_TAIL}) -> Tensor",
    "linear": "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
}
"""As optimum-rbln 0.12.0 calls them; the caches are written in place."""


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    seq: Tensor,
    scale: Tensor,
    block_table: Tensor,
    block_size: int,
    partition: int | None = None,
    is_bidirectional: bool = False,
    mask: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Write new keys and values into paged caches and attend causally to all up to each query.

    q `[B, K, G, S, d]`, k and v `[B, K, 1, S, d]`, caches `[N, K, 1, P, d]`, seq the first new position of each
    sequence, block_table `[B, blocks]` or `[blocks]`. New positions past the last block are neither kept nor attended
    to: they are a chunk's padding. float `[B, K, G, S, d]`, contiguous; softmax in float32.
    """
    if is_bidirectional or mask is not None or s_aux is not None:
        raise NotImplementedError("gori's graphs are causal, without masks and attention sinks")
    tables, starts = block_table.reshape(q.shape[0], -1).long(), seq.reshape(q.shape[0], -1)[:, 0].tolist()
    rows = [
        _attend(q[b], k[b, :, 0], v[b, :, 0], kcache, vcache, int(starts[b]), scale, tables[b], block_size)
        for b in range(q.shape[0])
    ]
    return torch.stack(rows).contiguous()


def _attend(
    q_KGSd: Tensor,
    k_KSd: Tensor,
    v_KSd: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    start: int,
    scale: Tensor,
    table: Tensor,
    block_size: int,
) -> Tensor:
    S, room = k_KSd.shape[1], len(table) * block_size
    kept = max(0, min(S, room - start))
    at = torch.arange(start, start + kept)
    blocks, offsets = table[at // block_size], at % block_size
    for cache, new in ((kcache, k_KSd), (vcache, v_KSd)):
        cache[blocks, :, 0, offsets] = new[:, :kept].transpose(0, 1).to(cache.dtype)
    end = start + kept
    used = table[: -(-end // block_size)]
    k_KCd, v_KCd = (c[used, :, 0].transpose(0, 1).flatten(1, 2)[:, :end].float() for c in (kcache, vcache))
    scores_KGSC = (q_KGSd.float() @ k_KCd.unsqueeze(1).transpose(-1, -2)) * scale.float()
    later = torch.arange(end) > (start + torch.arange(S)).unsqueeze(1)
    weights = scores_KGSC.masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ v_KCd.unsqueeze(1)).to(q_KGSd.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, contiguous."""
    return F.linear(input, weight, bias).contiguous()


BODIES: dict[str, Callable[..., Tensor]] = {
    "paged_causal_attn_prefill": causal_attention,
    "paged_causal_attn_decode": causal_attention,
    "paged_flash_causal_attn_prefill": causal_attention,
    "paged_flash_causal_attn_decode": causal_attention,
    "linear": linear,
}
"""Operator's name → what it computes."""


def _fake_attention(q: Tensor, *_args: Any, **_named: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


_library: torch.library.Library | None = None
"""Keeps the registration alive; None where nothing was registered."""


def sdk_present() -> bool:
    """Whether Rebellions' compiler is installed; it is not imported."""
    return importlib.util.find_spec("rebel") is not None


def register(force: bool = False) -> None:
    """Make `torch.ops.rbln_custom_ops` callable: Rebellions' own where its SDK is installed, else these bodies.

    `force` is for an environment in which something else goes by the name `rebel`.
    """
    global _library
    if _library is not None:
        return
    if sdk_present() and not force:
        importlib.import_module("rebel")  # registers its own, which must not be defined twice
        return
    _library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        _library.define(f"{name}{schema}")
        # contiguous, as the real outputs are: a fake of another layout makes torch.export trace other views
        _library.impl(name, BODIES[name], "CompositeExplicitAutograd")
        fake = _fake_linear if name == "linear" else _fake_attention
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
