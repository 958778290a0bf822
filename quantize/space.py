"""What a sweep tries: candidates as data, which of them a target and a student's widths hold, and why not the others.

Knows names of schemes, methods and targets; nothing of models or of how a candidate is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gori.errors import GoriError
from gori.quantize.methods import method
from gori.quantize.schemes import canonical, embedding_scheme, matching_embedding, scheme
from gori.targets import TARGETS, Target, answering, target

MATCHING = "matching"
"""The embedding scheme with the linears' bits and groups."""
MIXED = "mixed"
"""In place of one scheme: each weight's is chosen among those that the target holds; the table's, too."""
DEFAULT_SCHEMES: dict[str, tuple[str, ...]] = {
    "executorch": ("w4a8-g32", "w4a8-channel", "w8a8-channel"),
    "litert": ("w4a8-g32", "w4a8-channel", "w8a8-channel"),
    "tflite": ("w8a16-channel",),
    "gguf": ("w4a16-g32", "w8a16-g32"),
}
"""Target → the schemes that are tried where none is named; for engines that do not round activations as a scheme says,
those of `a16`: `a8` would give the same file."""
DEFAULT_METHODS = ("rtn", "mse", "gptq", "rotate+gptq")
DEFAULT_EMBEDDINGS = ("w4-g32", "w8-channel")
DEFAULT_TARGETS = ("executorch",)


@dataclass(frozen=True)
class Candidate:
    """One combination: everything that decides about its file, besides data and seed."""

    student: str
    """Which of the checkpoints, as it was named."""
    scheme: str
    """Of all linears; with mixed precision `mixed-a8` or `mixed-a16`: the activations are then all that is fixed."""
    method: str
    embedding: str
    bits_per_weight: float | None
    """A budget for mixed precision; None: one scheme for all linears."""
    target: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def integers(self) -> Candidate:
        """What all candidates with the same integers have in common: without mixed precision the target is free."""
        return self if self.bits_per_weight else replace(self, target="")

    @property
    def linear_scheme(self) -> str:
        """The scheme that the quantize stage is given; with mixed precision one of the right activations."""
        if not self.bits_per_weight:
            return self.scheme
        return mixed_linears(TARGETS[self.target], int(self.scheme.removeprefix(f"{MIXED}-a")))[0]


def mixed_linears(row: Target, activation_bits: int) -> list[str]:
    """The schemes of linears that a target holds at a width of activations."""
    return [n for n in row.linears if scheme(n).activation_bits == activation_bits]


@dataclass(frozen=True)
class Space:
    """The values that are combined; schemes by target, since targets differ in what they hold."""

    students: tuple[str, ...]
    targets: tuple[str, ...]
    schemes: Mapping[str, tuple[str, ...]]
    methods: tuple[str, ...]
    embeddings: tuple[str, ...]
    bits_per_weight: tuple[float, ...]
    """Budgets of candidates with mixed precision, beside those with one scheme."""
    mixed_tables: tuple[str, ...]
    """Embeddings of candidates with mixed precision."""

    def combinations(self) -> Iterator[Candidate]:
        """Every candidate once, whether a target holds it or not. Those with the same integers, which workers would
        wait for, lie far apart."""
        seen: dict[Candidate, None] = {}
        for student, name in itertools.product(self.students, self.targets):
            for s, table, how in itertools.product(self.schemes[name], self.embeddings, self.methods):
                seen.setdefault(candidate(student, name, s, table, how))
            activations = sorted({scheme(s).activation_bits for s in self.schemes[name]})
            rest = itertools.product(activations, self.mixed_tables, self.bits_per_weight, self.methods)
            for a, table, bits, how in rest:
                seen.setdefault(Candidate(student, f"{MIXED}-a{a}", how, table, bits, name))
        yield from seen


def candidate(student: str, name: str, scheme_name: str, embedding: str, how: str) -> Candidate:
    """A candidate with one scheme for all linears."""
    table = matching_embedding(scheme_name) if embedding == MATCHING else embedding
    return Candidate(student, scheme_name, how, table, None, name)


def space(
    students: Sequence[str],
    targets: Sequence[str] = (),
    schemes: Sequence[str] = (),
    methods: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    bits_per_weight: Sequence[float] = (),
) -> Space:
    """A space from what was named, defaults for what was not; GoriError for names that are unknown and for targets
    whose own engine does not run here."""
    names = tuple(dict.fromkeys(targets or DEFAULT_TARGETS))
    for name in names:
        if target(name).stand_in:
            able = ", ".join(answering(TARGETS))
            raise GoriError(
                f"--target {name}: a sweep measures on the real engine, and {TARGETS[name].engine} does not run here: "
                f"choose among {able}"
            )
    for name in embeddings:
        if name != MATCHING:
            embedding_scheme(name)
    if low := [b for b in bits_per_weight if not 0 < b <= 32]:
        raise GoriError(f"--bits-per-weight {low[0]:g}: a weight has more than 0 and at most 32 bits, as in 4.6")
    chosen = tuple(dict.fromkeys(canonical(s) for s in schemes))
    return Space(
        students=tuple(students),
        targets=names,
        schemes={n: chosen or DEFAULT_SCHEMES[n] for n in names},
        methods=tuple(dict.fromkeys(method(m).name for m in methods or DEFAULT_METHODS)),
        embeddings=tuple(dict.fromkeys(embeddings or DEFAULT_EMBEDDINGS)),
        bits_per_weight=tuple(dict.fromkeys(bits_per_weight)),
        mixed_tables=tuple(dict.fromkeys(e for e in embeddings if e != MATCHING)) or (MIXED,),
    )


Widths = Mapping[str, int]
"""What a linear's inputs are → how many: `hidden_size`, `heads * head_dim`, `intermediate_size`."""


def split(everything: Space, widths: Mapping[str, Widths]) -> tuple[list[Candidate], dict[str, int]]:
    """The candidates that can be made, and reason → number of those that cannot.

    `widths` are each student's. GoriError where nothing is left.
    """
    held: list[Candidate] = []
    left_out: dict[str, int] = {}
    for c in everything.combinations():
        reason = refusal(c, widths[c.student])
        if reason is None:
            held.append(c)
        else:
            left_out[reason] = left_out.get(reason, 0) + 1
    if not held:
        raise GoriError(f"no candidate can be made: {'; '.join(left_out)}: name other --schemes or --embeddings")
    return held, left_out


def refusal(c: Candidate, widths: Widths) -> str | None:
    """Why a candidate cannot be made; None where it can."""
    row = TARGETS[c.target]
    groups: dict[str, tuple[int, Widths]] = {}
    if c.bits_per_weight:
        if not mixed_linears(row, int(c.scheme.removeprefix(f"{MIXED}-a"))):
            return f"{row.engine} holds no scheme with activations as in {c.scheme}"
    elif c.scheme not in row.linears:
        return f"{row.engine} does not hold {c.scheme}"
    else:
        groups[c.scheme] = (scheme(c.scheme).group_size, widths)
    if c.embedding != MIXED:
        if c.embedding not in row.tables:
            return f"{row.engine} does not hold an embedding in {c.embedding}"
        if table := embedding_scheme(c.embedding):
            groups[c.embedding] = (table.group_size, {"hidden_size": widths["hidden_size"]})
    for name, (size, those) in groups.items():
        if wrong := [f"{what} {width}" for what, width in those.items() if size and width % size]:
            return f"{name}'s groups of {size} do not divide {c.student}'s {wrong[0]}"
    return None
