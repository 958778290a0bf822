"""What can be said of an ATOM-Max export without the SDK: numbers of the graphs, their operators, memory, a bound.

Every figure is an estimate of this machine and labelled so; nothing here has run on an NPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gori import checkpoint
from gori.console import log
from gori.errors import GoriError
from gori.export.atom_max_ops import NAMESPACE
from gori.export.atom_max_plan import Load, Plan
from gori.export.atom_max_run import Reference, Rounding, unrounded
from gori.export.parity import gap
from gori.export.weights import EMBEDDING, HEAD, Weights, linear_names
from gori.model import Decoder, KVCache, ModelConfig, rope_frequencies
from gori.quantized import QuantizedTensor

DECODED = 4
"""Tokens that each sequence decodes after its prefill."""
ROWS = 4096
"""Of a table that are looked at together."""
PIECE = 2**20
"""Values that are rounded together."""
REORDERED = 1e-4
"""Of the largest logit: what float32 summed in another order may differ by (3e-6 was measured on 12 layers)."""
ACCELERATED = {
    "abs", "add", "addmm", "bmm", "cat", "ceil", "clamp", "div", "eq", "floor", "ge", "gt", "index_copy",
    "index_select", "le", "linear", "log", "logical_not", "lt", "masked_fill", "max", "maximum", "mean", "min",
    "minimum", "mm", "mul", "ne", "neg", "pow", "repeat_interleave", "rsqrt", "sigmoid", "silu", "softmax", "sub",
    "where",
}  # fmt: skip
HOST = {
    "acos", "asin", "atan", "argmax", "argmin", "sort", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor",
    "bucketize", "cosh", "erf",
}  # fmt: skip
"""Rebellions' published lists for eager mode; the compiler's own list is not public."""


class Rounded:
    """Rounds every operator's result to float16 or bfloat16 and counts what leaves its range.

    Operators compute in float32 inside, so sums and softmax are not rounded term by term.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.overflows: Counter[str] = Counter()

    def __call__(self, name: str, value: Tensor) -> Tensor:
        # in pieces, and without a copy where nothing changes: a table is a quarter of the model
        pieces = value.reshape(-1).split(PIECE)
        if all(torch.equal(p.to(self.dtype).float(), p) for p in pieces):
            return value
        out = torch.empty(value.shape)
        for rounded, piece in zip(out.view(-1).split(PIECE), pieces, strict=True):
            rounded.copy_(piece.to(self.dtype))
            lost = int((rounded.isinf() & ~piece.isinf()).sum())
            if lost:
                self.overflows[name] += lost
        return out


def lengths(plan: Plan) -> list[int]:
    """Prompts of two sequences: one over a chunk's boundary, one that ends on it."""
    return [min(plan.chunk + plan.chunk // 2 + 1, plan.context - DECODED), plan.chunk]


def sequences(vocab_size: int, plan: Plan, seed: int = 0) -> list[list[int]]:
    """Random ids of two sequences, each with DECODED more than its prompt has."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n + DECODED,), generator=generator).tolist() for n in lengths(plan)]


def eager_rows(model: Decoder, ids: list[list[int]], plan: Plan) -> Tensor:
    """The eager decoder's logits after each prompt and each decoded token, `[2 + 3 * DECODED, V]`, ordered as
    `graph_rows`: the last DECODED of the second sequence's rows are decoded with the first's, once more alone."""
    rows: list[list[Tensor]] = []
    with torch.inference_mode():
        for prompt, sequence in zip(lengths(plan), ids, strict=True):
            hidden = model.hidden(torch.tensor([sequence]), KVCache(model.cfg, 1, len(sequence)))[0]
            logits = model.logits(hidden[prompt - 1 :]).float()
            rows.append(list(logits[: DECODED + 1]))
    first, second = rows
    pairs = [row for i in range(1, DECODED + 1) for row in (first[i], second[i])]
    return torch.stack([first[0], second[0], *pairs, *first[1:]])


def graph_rows(reference: Reference, ids: list[list[int]], plan: Plan) -> Tensor:
    """The graphs' logits: both prompts chunk by chunk, then tokens of both at once, then the first's alone again."""
    rows = []
    for number, (prompt, sequence) in enumerate(zip(lengths(plan), ids, strict=True)):
        parts = range(0, prompt, plan.chunk)
        rows.append([reference.prefill(sequence[s : min(s + plan.chunk, prompt)], s, number) for s in parts][-1])
    for i in range(DECODED):
        at = [n + i for n in lengths(plan)]
        fill = max(reference.programs) - 2
        # sequences beyond the two that are compared decode the first token of an empty cache
        tokens = [sequence[p] for sequence, p in zip(ids, at, strict=True)] + [0] * fill
        rows += reference.decode(tokens, at + [0] * fill)[:2]
    for i in range(DECODED):
        at = lengths(plan)[0] + i
        rows.append(reference.decode([ids[0][at]], [at])[0])
    return torch.stack(rows)


def decoder_of(w: Weights, *, carried: bool) -> Decoder:
    """The eager decoder of a checkpoint's weights: integers multiplied out, and with `carried` all that the written
    directory holds in float16 rounded so. Tensors are shared with `w`, so it costs the multiplied integers alone.

    Raises GoriError for a tensor that is missing.
    """
    cfg = replace(w.cfg, tied=w.head_name == EMBEDDING)
    with torch.device("meta"):
        model = Decoder(cfg)
    state: dict[str, Tensor] = {}
    # one buffer: it goes back to the system as a whole, where a thousand small ones would stay in the allocator
    buffer, at = torch.empty(sum(t.q.numel() for t in w.integers.values())), 0
    for name in model.state_dict():
        hf = checkpoint.to_hf_name(name)
        if hf not in w.integers and hf not in w.floats:
            raise GoriError(f"the checkpoint lacks {hf}: copy it again")
        if hf in w.integers:
            state[name] = t = _multiplied(w.integers[hf], buffer[at:])
            at += t.numel()
            if carried and hf in (EMBEDDING, HEAD):
                t.copy_(t.half())
        else:
            t = w.floats[hf]
            state[name] = t.half().float() if carried else t
    model.load_state_dict(state, assign=True)
    model.rope_freq = rope_frequencies(cfg)
    return model.eval()


def _multiplied(t: QuantizedTensor, buffer: Tensor) -> Tensor:
    """`t.dequantize()` at the start of a buffer."""
    out = buffer[: t.q.numel()].view(*t.q.shape)
    grouped = (len(out), t.scale.shape[1], -1)
    torch.mul(t.q.view(grouped), t.scale.unsqueeze(-1), out=out.view(grouped))
    return out


def expected(w: Weights, plan: Plan) -> tuple[Tensor, Tensor]:
    """What the student says to the two sequences, and what it says with its floats in float16: before the graphs are
    there, since each decoder is as large as the float model."""
    ids = sequences(w.cfg.vocab_size, plan)
    student, carried = (eager_rows(decoder_of(w, carried=c), ids, plan) for c in (False, True))
    return student, carried


def numbers(
    cfg: ModelConfig,
    plan: Plan,
    programs: dict[int, ExportedProgram],
    weights: dict[str, Tensor],
    eager: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """The graphs against what was `expected`: in float32, and in simulated float16 and bfloat16. Rounds `weights` in
    place at the end.

    Raises GoriError if the graphs do not compute, in float32, the student with its floats in float16.
    """
    ids, (student, carried) = sequences(cfg.vocab_size, plan), eager

    def run(rounding: Rounding) -> Tensor:
        return graph_rows(Reference(cfg, plan, programs, weights, max(programs), rounding), ids, plan)

    got = run(unrounded)
    reordered = float((got - carried).abs().max() / carried.abs().max())
    log(f"reference graphs in float32: {reordered:.1e} of the largest logit from eager")
    if not reordered <= REORDERED:
        raise GoriError(
            f"the static graphs are off by {reordered:.1e} of the largest logit from the student with float16 weights "
            f"(allowed {REORDERED:.0e}): nothing was written; report the model's config.json"
        )
    found: dict[str, Any] = {
        "float32": {
            "against_carried_weights": significant(reordered),
            "bound": REORDERED,
            **compared(got, student),
        }
    }
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        rounded = Rounded(dtype)
        if dtype == torch.bfloat16:  # the last run: nobody needs the weights after it, and a copy would be the peak
            for t in weights.values():
                if t.is_floating_point():
                    t.copy_(rounded("weight", t))
        other = run(rounded)
        count = sum(rounded.overflows.values())
        found[name] = {"overflows": count, "overflows_by_operator": dict(sorted(rounded.overflows.items()))}
        found[name] |= compared(other, student) if other.isfinite().all() else {"finite": False}
        log(f"simulated {name}: {count} overflows, KL {found[name].get('kl_mean', 'not finite')}")
    covered = "a prompt over a chunk's boundary, one that ends on it, decode of both at once, decode of one"
    return {"label": "simulation on a CPU, an estimate", "positions": len(got), "covers": covered, **found}


def compared(got: Tensor, want: Tensor) -> dict[str, float | int]:
    """KL in nats, largest |difference of a logit|, and positions whose largest logit is another."""
    g = gap(got, want)
    flips = round((1 - g.top1) * g.positions)
    return {
        "kl_mean": significant(g.kl_mean),
        "kl_max": significant(g.kl_max),
        "max_abs": significant(g.max_abs),
        "argmax_flips": flips,
    }


def significant(value: float) -> float:
    """Two figures: the last ones of a float32 sum depend on the machine."""
    return float(f"{value:.1e}")


def legality(programs: dict[int, ExportedProgram]) -> dict[str, Any]:
    """Every operator of the graphs, in three states."""
    counts: Counter[str] = Counter()
    for program in programs.values():
        for node in program.graph.nodes:
            namespace = getattr(node.target, "namespace", None)
            if node.op == "call_function" and namespace in ("aten", NAMESPACE):
                name = node.target._schema.name.removeprefix("aten::")
                counts[name] += name != "_assert_tensor_metadata"
    table = {name: {"state": state(name), "count": n} for name, n in sorted(counts.items()) if n}
    states = {s: sorted(n for n, row in table.items() if row["state"] == s) for s in ("accelerated", "host", "unknown")}
    return {"basis": "Rebellions' published eager list and its own operators", **states, "operators": table}


def state(name: str) -> str:
    """accelerated, host, or unknown: the published lists name views and look-ups on neither side."""
    if name in ACCELERATED or name.startswith(f"{NAMESPACE}::"):
        return "accelerated"
    return "host" if name in HOST else "unknown"


def load_of(w: Weights) -> Load:
    """Bytes on the card: int4 packed, scales and floats in 16 bits, a tied table laid out twice (which the compiler may
    spare)."""
    linears = linear_names(w.cfg, w.head_name)[:-1]
    head = w.cfg.vocab_size * w.cfg.hidden_size * 2
    split = head + sum(_tensor_bytes(w, n) for n in linears)
    others = [t for n, t in w.floats.items() if n not in {*linears, EMBEDDING, HEAD}]
    whole = head + 2 * sum(t.numel() for t in others)
    return Load(split, whole, w.cfg.layers, w.cfg.kv_heads, w.cfg.head_dim)


def _tensor_bytes(w: Weights, name: str) -> int:
    return w.integers[name].packed_bytes() if name in w.integers else 2 * w.floats[name].numel()


def rounding_of_tables(w: Weights, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What float16 costs integer tables, relative to each weight: nothing for 4 bits (3 + 8 bits of a product fit its
    11), up to 2^-11 for 8 bits, a sixteenth of a step at most."""
    found = {}
    for name in names:
        if name in w.integers:
            largest = of_a_step = 0.0
            for q, scale in zip(w.integers[name].q.split(ROWS), w.integers[name].scale.split(ROWS), strict=True):
                exact = q.float().view(len(q), scale.shape[1], -1) * scale.unsqueeze(-1)
                error = (exact.half().float() - exact).abs_()
                largest = max(largest, float(error.max()))
                of_a_step = max(of_a_step, float((error / scale.unsqueeze(-1)).max()))
            found[name] = {"max_error": significant(largest), "max_error_of_a_step": significant(of_a_step)}
    return found
