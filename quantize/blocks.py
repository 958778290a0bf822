"""A decoder's blocks one at a time: the inputs of every linear over a calibration set, without ever running the whole.

A block's linears meet the data at four sites, each fed by what the one before computed. Methods walk along them with
one copy of the activations, or two (what the float model computes, and what the quantized one does so far).
Shapes in names as in gori.model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gori.model import MLP, Block, Decoder
from gori.quantize.calibration import Batch

SITES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a block that have one input in common, in the order in which the data meets them."""


class Kept:
    """Where activations wait between two sites: in memory, or in files of a directory that the system pages in."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._files = 0

    def keep(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """The tensor itself, or its copy in a mapped file; `into` is what it replaces."""
        if self.directory is None:
            return x
        if into is None or into.shape != x.shape:
            self._files += 1
            into = torch.from_file(str(self.directory / f"{self._files}.f32"), shared=True, size=x.numel())
            into = into.view(x.shape)
        return into.copy_(x)


@contextmanager
def kept(on_disk: Path | None) -> Iterator[Kept]:
    """A place for activations: memory, or a directory inside `on_disk` that vanishes afterwards."""
    if on_disk is None:
        yield Kept()
        return
    on_disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=on_disk, prefix="activations-") as directory:
        yield Kept(Path(directory))


class Stream:
    """One copy of a calibration set's activations on its way through the blocks: each batch's residual `[B, T, D]` and
    the input of the site where it stands."""

    def __init__(self, model: Decoder, batches: Sequence[Batch], place: Kept) -> None:
        self._place = place
        self._rope = [model.rope(torch.arange(b.ids_BT.shape[1]).unsqueeze(0)) for b in batches]
        self.residual = [place.keep(model.embed_tokens(b.ids_BT)) for b in batches]
        self.inputs: list[Tensor] = []

    @torch.no_grad()
    def advance(self, block: Block, site: int) -> None:
        """Make `inputs` those of a site of SITES, from the site before (or, for site 0, from the residual)."""
        found = []
        for i, rope in enumerate(self._rope):
            old = self.inputs[i] if self.inputs else None
            if site == 0:
                new = block.input_layernorm(self.residual[i])
            elif site == 1:
                new = block.self_attn(old, rope, None, None)
            elif site == 2:
                self._add(i, block.self_attn.o_proj(old))
                new = block.post_attention_layernorm(self.residual[i])
            else:
                mlp = dense(block)
                new = F.silu(mlp.gate_proj(old)) * mlp.up_proj(old)
            found.append(self._place.keep(new, old))
        self.inputs = found

    @torch.no_grad()
    def leave(self, block: Block) -> None:
        """Pass the last site: the residual is then the next block's."""
        for i, x in enumerate(self.inputs):
            self._add(i, dense(block).down_proj(x))

    def _add(self, i: int, y: Tensor) -> None:
        self.residual[i] = self._place.keep(self.residual[i] + y, self.residual[i])


def blocks(model: Decoder) -> list[Block]:
    """A decoder's blocks, from the first to the last."""
    found = [b for b in model.layers if isinstance(b, Block)]
    assert len(found) == len(model.layers)
    return found


def dense(block: Block) -> MLP:
    """The MLP of a block that is no mixture of experts."""
    assert isinstance(block.mlp, MLP)
    return block.mlp


def linear(block: Block, name: str) -> torch.nn.Linear:
    """A linear of SITES."""
    found = block.get_submodule(name)
    assert isinstance(found, torch.nn.Linear)
    return found


def weight_name(layer: int, name: str) -> str:
    """The Hugging Face name of a linear's weight."""
    return f"model.layers.{layer}.{name}.weight"
