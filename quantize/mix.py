"""Mixed precision: what each weight's scheme costs in KL, alone, and the assignment that costs least within a budget.

Costs add: KL is quadratic in a small change of the logits, and what different weights' errors do to them is nearly
uncorrelated. Sensitivities are measured, not derived from a weight's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gori import console
from gori.errors import GoriError
from gori.model import Decoder, places
from gori.quantize.assign import Option, assign
from gori.quantize.blocks import Kept, Stream, blocks
from gori.quantize.calibration import Batch
from gori.quantize.fidelity import Reference
from gori.quantize.layout import check_width, mixed, weight_of
from gori.quantize.methods import SENSITIVITY_ROWS
from gori.quantize.rtn import METHODS, round_to_nearest
from gori.quantize.schemes import EMBEDDINGS, SCHEMES, canonical, embedding_scheme, matching_embedding, scheme
from gori.quantized import EMBEDDING, HEAD, Quantization, TensorScheme, packed_bytes, quantizable
from gori.targets import TARGETS


@dataclass(frozen=True)
class Mix:
    """A budget and what may be chosen from; one of `bits_per_weight` and `size_bytes` is given."""

    linears: tuple[str, ...]
    """Schemes of linear layers."""
    tables: tuple[str, ...]
    """Schemes of the embedding table."""
    bits_per_weight: float | None = None
    """Bits of all integers and scales over the float model's weights, each counted once."""
    size_bytes: int | None = None
    """Bytes of all integers and scales."""
    copied_head: bool = False
    """Whether a shared table stands in the file twice."""
    rows: int = SENSITIVITY_ROWS


def mix_of(
    names: str,
    scheme_name: str,
    embedding: str | None,
    bits_per_weight: float | None,
    size_bytes: int | None,
    rows: int = SENSITIVITY_ROWS,
) -> Mix:
    """Read `--mix`: a target's name (what its format holds, with the activations of `scheme_name`) or schemes."""
    if (bits_per_weight is None) == (size_bytes is None):
        raise GoriError("mixed precision needs one budget: --bits-per-weight or --size")
    activations = scheme(scheme_name).activation_bits
    if names in TARGETS:
        row = TARGETS[names]
        linears = tuple(n for n in row.linears if SCHEMES[n].activation_bits == activations)
        tables = tuple(n for n in row.tables if n != "float")
        if not linears:
            raise GoriError(f"{row.engine} holds no scheme with {activations}-bit activations, as {scheme_name} has")
        return Mix(linears, _tables(tables, embedding), bits_per_weight, size_bytes, row.copied_head, rows)
    linears = tuple(canonical(n) for n in names.split(","))
    if wrong := [n for n in linears if SCHEMES[n].activation_bits != activations]:
        raise GoriError(f"--mix {wrong[0]} has other activations than {scheme_name}: mix weights' schemes only")
    tables = tuple(dict.fromkeys([*map(matching_embedding, linears), "w8-channel"]))
    return Mix(linears, _tables(tables, embedding), bits_per_weight, size_bytes, False, rows)


def _tables(tables: tuple[str, ...], embedding: str | None) -> tuple[str, ...]:
    if embedding is None:
        return tables
    embedding_scheme(embedding)
    return (embedding,)


@dataclass(frozen=True)
class Choice:
    """An item's way to be held: schemes of one weight, or of the table and the head together."""

    label: str
    schemes: tuple[tuple[str, TensorScheme], ...]
    """Weight's name and scheme; a shared table has no entry for the head."""
    size_bytes: int


def mixed_layout(model: Decoder, mix: Mix, batches: Sequence[Batch]) -> tuple[Quantization, dict[str, Any]]:
    """The layout of least summed KL within the budget, and the facts that led to it. Sensitivities are those of
    searched scales (`mse`) with float activations."""
    probe = Probe(model, _first_rows(batches, mix.rows))
    items = choices(model, mix)
    costs = probe.costs(items)
    budget = budget_bytes(model, mix)
    options = [[Option(c.size_bytes, k) for c, k in zip(cs, costs[n], strict=True)] for n, cs in items.items()]
    picked = [cs[i] for cs, i in zip(items.values(), assign(options, budget), strict=True)]
    size = sum(c.size_bytes for c in picked)
    weights = weight_count(model)
    facts = {
        "budget_bytes": budget,
        "size_bytes": size,
        "bits_per_weight": round(8 * size / weights, 4),
        "summed_kl": sum(costs[n][cs.index(p)] for (n, cs), p in zip(items.items(), picked, strict=True)),
        "sensitivity": {n: dict(zip([c.label for c in cs], costs[n], strict=True)) for n, cs in items.items()},
    }
    tensors = {name: s for c in picked for name, s in c.schemes}
    return mixed(model, f"mixed-{8 * size / weights:.2f}", tensors), facts


def weight_count(model: Decoder) -> int:
    """Weights of linears, table and an untied head, each once."""
    names = [*quantizable(model), EMBEDDING, *([] if model.cfg.tied else [HEAD])]
    return sum(weight_of(model, n).numel() for n in names)


def budget_bytes(model: Decoder, mix: Mix) -> int:
    """The budget in bytes."""
    if mix.size_bytes is not None:
        return mix.size_bytes
    assert mix.bits_per_weight is not None
    return int(mix.bits_per_weight * weight_count(model) / 8)


def choices(model: Decoder, mix: Mix) -> dict[str, list[Choice]]:
    """Item → its choices: every linear; the table, with the head where they are tied, else the head apart."""
    found = {n: _linear_choices(model, n, mix.linears) for n in quantizable(model)}
    if model.cfg.tied:
        found[EMBEDDING] = _tied_choices(model, mix)
    else:
        found[EMBEDDING] = _table_choices(model, mix.tables)
        found[HEAD] = _linear_choices(model, HEAD, mix.linears)
    if empty := [n for n, cs in found.items() if not cs]:
        raise GoriError(f"no scheme of {', '.join(mix.linears)} fits the width of {empty[0]}: allow -channel schemes")
    return found


def _fits(width: int, s: TensorScheme, name: str) -> bool:
    try:
        check_width(width, s, name)
    except GoriError:
        return False
    return True


def _linear_choices(model: Decoder, name: str, schemes: Sequence[str]) -> list[Choice]:
    out, width = weight_of(model, name).shape
    return [
        Choice(n, ((name, SCHEMES[n]),), packed_bytes((out, width), SCHEMES[n]))
        for n in schemes
        if _fits(width, SCHEMES[n], name)
    ]


def _table_choices(model: Decoder, tables: Sequence[str]) -> list[Choice]:
    out, width = weight_of(model, EMBEDDING).shape
    found = []
    for n in tables:
        s = EMBEDDINGS[n]
        if s is None:
            found.append(Choice("float", (), 4 * out * width))
        elif _fits(width, s, EMBEDDING):
            found.append(Choice(n, ((EMBEDDING, s),), packed_bytes((out, width), s)))
    return found


def _tied_choices(model: Decoder, mix: Mix) -> list[Choice]:
    """A table that is the head too, and tables with a head apart."""
    tables, heads = _table_choices(model, mix.tables), _linear_choices(model, HEAD, mix.linears)
    held = {(s.bits, s.group_size) for h in heads for _, s in h.schemes}
    shared = [
        Choice(f"{t.label} shared", t.schemes, t.size_bytes * (2 if mix.copied_head else 1))
        for t in tables
        if t.schemes and (t.schemes[0][1].bits, t.schemes[0][1].group_size) in held
    ]
    apart = [
        Choice(f"{t.label} + head {h.label}", (*t.schemes, *h.schemes), t.size_bytes + h.size_bytes)
        for t in tables
        for h in heads
    ]
    return shared + apart


def _first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """Batches cut to the rows of lowest number in the sample."""
    found = []
    for b in batches:
        keep = b.rows_B < rows
        if keep.any():
            width = int(b.valid_BT[keep].sum(1).max())
            ids, valid, answer = (t[keep][:, :width].contiguous() for t in (b.ids_BT, b.valid_BT, b.answer_BT))
            found.append(Batch(ids, valid, answer, b.rows_B[keep]))
    return found


class Probe:
    """KL(float || model with one weight rounded), the rest float; what comes before that weight's block is computed
    once."""

    def __init__(self, model: Decoder, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.reference = Reference(model, batches)
        self.before: list[list[Tensor]] = []
        """Each block's input residuals, batch by batch."""
        stream = Stream(model, batches, Kept())
        for block in blocks(model):
            self.before.append(list(stream.residual))
            for site in range(4):
                stream.advance(block, site)
            stream.leave(block)

    def costs(self, items: dict[str, list[Choice]]) -> dict[str, list[float]]:
        """KL of every choice, in nats; that of a table with a head apart is the sum of both alone."""
        found: dict[str, list[float]] = {}
        alone: dict[tuple[str, TensorScheme, bool], float] = {}
        with console.steps("sensitivity", len(items)) as bar:
            for done, (item, cs) in enumerate(items.items(), start=1):
                found[item] = []
                for c in cs:
                    shared = c.label.endswith(" shared")
                    for name, s in c.schemes:
                        if (name, s, shared) not in alone:
                            alone[name, s, shared] = self.kl(name, s, shared)
                    found[item].append(sum(alone[n, s, shared] for n, s in c.schemes))
                bar.update(done, "")
        return found

    @torch.inference_mode()
    def kl(self, name: str, s: TensorScheme, shared: bool = False) -> float:
        """With one weight rounded; of a shared table as table and head."""
        W = weight_of(self.model, name)
        new = round_to_nearest(W, s, name, METHODS["mse"]).dequantize()
        if name == HEAD:
            return self.reference.of(lambda i: self.reference.hidden[i] @ new.mT).kl_mean
        if name == EMBEDDING:
            head = new if shared else weight_of(self.model, HEAD)
            return self.reference.of(lambda i: self._from(0, i, new[self.batches[i].ids_BT]) @ head.mT).kl_mean
        layer = int(name.split(".")[2])
        module = self.model.get_submodule(name.removeprefix("model.").removesuffix(".weight"))
        old = module.weight
        try:
            module.weight = torch.nn.Parameter(new, requires_grad=False)
            return self.reference.of(lambda i: self.model.logits(self._from(layer, i, self.before[layer][i]))).kl_mean
        finally:
            module.weight = old

    def _from(self, layer: int, i: int, x_BTD: Tensor) -> Tensor:
        """Normed last hidden states `[answers, D]` of a batch from a block's input residual on."""
        b = self.batches[i]
        rope = self.model.rope(torch.arange(b.ids_BT.shape[1]).unsqueeze(0))
        last, wanted_W = len(self.model.layers) - 1, places(b.answer_BT)
        for n in range(layer, last + 1):
            x_BTD = self.model.layers[n](x_BTD, rope, None, None, None, wanted_W if n == last else None)
        return self.model.norm(x_BTD[0])
