"""Whether an engine computes what the eager model computes, judged by the noise floor of that model.

Float32 sums in another order flip the rounding of int8 activations, so two faithful engines differ by far more than
float32's precision, and by how much depends on the model. The floor is therefore measured: the eager model against
itself with noise of one unit in the last place. Knows nothing of files or of how an engine was made.

Shapes in names: T tokens of a prompt, N positions compared, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gori.errors import GoriError
from gori.export import golden
from gori.model import Decoder
from gori.norm import RMSNorm
from gori.runtime.session import Session, SessionInfo

Prompt = Sequence[int]

RELATIVE_NOISE = 1e-7
"""About one unit in the last place of float32 (2^-23 = 1.2e-7)."""
FACTOR = 1.5
"""How far above the floor an engine may lie: mean KLs of single floor runs differ by up to 1.2 (docs)."""
KL_EPSILON = 1e-5
"""Added to the floor, in nats. In a small model roundings flip so seldom that a run has none or one, and one moved the
mean of 86 positions by 3e-6 (1 layer, width 128); 1e-5 is a 600th of what int4 weights cost."""
LOGIT_EPSILON = 1e-5
"""Of the largest logit: what float32 sums in another order differ by when nothing is rounded (3e-6 was measured)."""
SEEDS = (0, 1, 2)
"""Of the noise."""
SETS = 4
"""Sets of random prompts at most. A single set's mean KL is a draw: ten sets of one model, run by llama.cpp, varied by
40 %. So a verdict that is missed by less than CLOSE is taken again over more sets, the floor as well as the engine."""
CLOSE = 2.0
DECODED = 16
"""Tokens of each prompt that are also decoded one by one."""
LARGE_VOCABULARY = 8192
"""Above it only as many as travel: a position's logits are 0.6 MB at 164k tokens, and each is held five times."""


@dataclass(frozen=True)
class Gap:
    """How far one set of logits lies from another."""

    positions: int
    max_abs: float
    """Largest |difference of a logit|, of all positions; the next two are over each position's largest."""
    abs_p05: float
    abs_median: float
    kl_mean: float
    """KL(reference ‖ other) in nats, over positions."""
    kl_p99: float
    kl_max: float
    top1: float
    """Share of positions whose largest logit is the same."""


@dataclass(frozen=True)
class Calm:
    """Whether the engine is exact where the model lets it be.

    Once roundings have flipped, the floor hides errors smaller than itself. So where most positions pass without a flip
    in the floor, the best twentieth must in the engine, too; where they do not, this half says nothing.
    """

    engine_p05: float
    floor_median: float
    bound: float
    """FACTOR times the floor's median plus LOGIT_EPSILON of the largest logit."""

    @property
    def met(self) -> bool:
        return self.engine_p05 <= self.bound


@dataclass(frozen=True)
class Parity:
    """An engine's gap, the model's noise floor, and the verdict.

    Its first half is on the mean KL over all positions: a maximum is one draw from a heavy tail and differs twofold
    between two floors, a mean of a hundred positions does not. Its second half is `Calm`.
    """

    engine: Gap
    floor: Gap
    kl_bound: float
    """FACTOR times the floor's mean KL plus KL_EPSILON."""
    single: Calm
    """Over prompts of one token, where the fewest activations are rounded and no position is turned."""
    longer: Calm
    """Over the others."""

    @property
    def met(self) -> bool:
        return self.engine.kl_mean <= self.kl_bound and self.single.met and self.longer.met

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def gap(got_NV: Tensor, want_NV: Tensor) -> Gap:
    """Compare float32 logits `[N, V]` with a reference's. KL in float64: float32's own rounding is 1e-7."""
    p, q = want_NV.double().log_softmax(-1), got_NV.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    largest_N = (got_NV - want_NV).abs().amax(-1).double()
    return Gap(
        positions=len(kl),
        max_abs=float(largest_N.max()),
        abs_p05=float(largest_N.quantile(0.05)),
        abs_median=float(largest_N.median()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        top1=float((got_NV.argmax(-1) == want_NV.argmax(-1)).double().mean()),
    )


def eager_logits(model: Decoder, prompt: Prompt, decoded: int = DECODED) -> Tensor:
    """The eager model's logits at the same positions, all from one pass without a cache."""
    with torch.inference_mode():
        hidden_TD = model.hidden(torch.tensor([list(prompt)]))[0]
        return model.logits(hidden_TD[golden.positions(len(prompt), decoded)]).float()


def noisy_logits(model: Decoder, prompt: Prompt, seed: int, decoded: int = DECODED) -> Tensor:
    """`eager_logits` with relative noise of one last place on the embedding and behind every norm: an engine that sums
    in another order differs everywhere, not only at the input."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * (1 + RELATIVE_NOISE * torch.randn(output.shape, generator=generator))

    sites = [model.embed_tokens, *(m for m in model.modules() if isinstance(m, RMSNorm))]
    hooks = [m.register_forward_hook(disturb) for m in sites]
    try:
        return eager_logits(model, prompt, decoded)
    finally:
        for hook in hooks:
            hook.remove()


def _worst(noisy: list[list[Tensor]], want: list[Tensor]) -> Gap:
    """The noise floor: the eager model against itself with noise, each field the worst over the runs."""
    gaps = [gap(torch.cat(run), torch.cat(want)) for run in noisy]
    worst: dict[str, Any] = {f.name: max(getattr(g, f.name) for g in gaps) for f in fields(Gap)}
    worst["top1"] = min(g.top1 for g in gaps)
    return Gap(**worst)


@dataclass(frozen=True)
class Runs:
    """Logits `[N, V]` of each prompt: the reference's, the engine's, and the reference's in other arithmetic."""

    prompts: list[Prompt]
    want: list[Tensor]
    got: list[Tensor]
    noisy: list[list[Tensor]]

    def cut(self, decoded: int) -> Runs:
        """The same with fewer decoded tokens a prompt: those at `golden.positions(length, decoded)`."""
        wide = decoded_tokens(self.want[0].shape[-1])
        kept = []
        for p in self.prompts:
            there = golden.positions(len(p), wide)
            kept.append([there.index(i) for i in golden.positions(len(p), decoded)])

        def some(rows: list[Tensor]) -> list[Tensor]:
            return [r[k] for r, k in zip(rows, kept, strict=True)]

        return Runs(self.prompts, some(self.want), some(self.got), [some(run) for run in self.noisy])


def decoded_tokens(vocab_size: int) -> int:
    """Tokens of each prompt that are decoded one by one."""
    return DECODED if vocab_size <= LARGE_VOCABULARY else golden.DECODED


def engine_runs(session: Session, prompts: Sequence[Prompt]) -> list[Tensor]:
    """What an engine says to each prompt."""
    return [torch.from_numpy(golden.logits(session, p, decoded_tokens(session.info.vocab_size))) for p in prompts]


def reference_runs(
    model: Decoder, prompts: Sequence[Prompt], arithmetic: str = "float32"
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """What the eager model says to each prompt, and its noise floor: what it says in `arithmetic` (float32 with noise
    of its last place, or float16, in which the model is left: a copy would need half its memory again)."""
    decoded = decoded_tokens(model.cfg.vocab_size)
    want = [eager_logits(model, p, decoded) for p in prompts]
    if arithmetic == "float16":
        half = _to_float16(model)
        return want, [[eager_logits(half, p, decoded) for p in prompts]]
    return want, [[noisy_logits(model, p, seed, decoded) for p in prompts] for seed in SEEDS]


def join(
    prompts: Sequence[Prompt],
    got: list[Tensor],
    reference: tuple[list[Tensor], list[list[Tensor]]],
    info: SessionInfo,
) -> Runs:
    """Both sides. Where an engine gives log-probabilities, so does the model."""
    if info.log_probabilities:
        got, want, *noisy = ([r.log_softmax(-1) for r in rows] for rows in (got, reference[0], *reference[1]))
        return Runs(list(prompts), want, got, noisy)
    return Runs(list(prompts), reference[0], got, reference[1])


def _to_float16(model: Decoder) -> Decoder:
    """The model itself, its weights made float16 one by one; angles stay float32, as every engine computes them."""
    angles = model.rope_freq
    model.half()
    model.rope_freq = angles
    return model


def judge(runs: Runs) -> Parity:
    """The verdict on what both said. Some prompts must be single tokens and some longer, as in `default_prompts`."""
    floor = _worst(runs.noisy, runs.want)

    def calm(chosen: list[int]) -> Calm:
        reference = [runs.want[i] for i in chosen]
        median = _worst([[run[i] for i in chosen] for run in runs.noisy], reference).abs_median
        found = gap(torch.cat([runs.got[i] for i in chosen]), torch.cat(reference))
        return Calm(found.abs_p05, median, FACTOR * median + LOGIT_EPSILON * float(torch.cat(reference).abs().max()))

    return Parity(
        engine=gap(torch.cat(runs.got), torch.cat(runs.want)),
        floor=floor,
        kl_bound=FACTOR * floor.kl_mean + KL_EPSILON,
        single=calm([i for i, p in enumerate(runs.prompts) if len(p) == 1]),
        longer=calm([i for i, p in enumerate(runs.prompts) if len(p) > 1]),
    )


def pooled(a: Runs, b: Runs) -> Runs:
    """Two sets of runs as one."""
    noisy = [[*x, *y] for x, y in zip(a.noisy, b.noisy, strict=True)]
    return Runs([*a.prompts, *b.prompts], [*a.want, *b.want], [*a.got, *b.got], noisy)


def is_close(found: Parity) -> bool:
    """Missed in the mean KL alone, and by so little that more prompts may tell."""
    return not found.met and found.single.met and found.longer.met and found.engine.kl_mean <= CLOSE * found.kl_bound


def measure_parity(session: Session, model: Decoder, prompts: Sequence[Prompt], arithmetic: str = "float32") -> Parity:
    """The verdict on an engine that is open beside its model."""
    got = engine_runs(session, prompts)
    return judge(join(prompts, got, reference_runs(model, prompts, arithmetic), session.info))


def describe(found: Parity) -> str:
    """One line for a log."""
    e, f = found.engine, found.floor
    return (
        f"parity on {e.positions} positions, noise floor in brackets: KL {e.kl_mean:.2e} ({f.kl_mean:.2e}), "
        f"max |Δlogit| {e.max_abs:.2e} ({f.max_abs:.2e}), top-1 {e.top1:.3f} ({f.top1:.3f})"
    )


def require_parity(found: Parity, engine: str) -> None:
    """GoriError unless the verdict is met."""
    if not found.met:
        single, longer = found.single, found.longer
        raise GoriError(
            f"{engine} does not compute the checkpoint's logits: mean KL {found.engine.kl_mean:.2e} over "
            f"{found.engine.positions} positions (allowed {found.kl_bound:.2e}), best twentieth off by "
            f"{single.engine_p05:.2e} for single tokens ({single.bound:.2e}) and {longer.engine_p05:.2e} for longer "
            f"prompts ({longer.bound:.2e}): nothing was written; try another version of the engine and report the "
            "model's config.json"
        )


def default_prompts(vocab_size: int, context: int, chunk: int, seed: int) -> list[list[int]]:
    """Random prompts of the lengths at which engines go wrong: one token, a chunk's boundary, a full context."""
    generator = torch.Generator().manual_seed(seed)
    wanted = [1] * 16 + [2, 3, 9, 33, chunk - 1, chunk, chunk + 1, context]
    lengths = [n for n in wanted if 1 <= n <= context]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
