"""The quantization methods as data, and how a name such as `rotate+gptq+tune` is read.

A method is up to three steps: transforms that make a float model easier to round, one rounding that chooses integers
and scales, and a training that improves them. Knows nothing of files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gori.errors import GoriError, nearest
from gori.targets import named

Kind = Literal["transform", "rounding", "training"]
KINDS: tuple[Kind, ...] = ("transform", "rounding", "training")
"""In the order in which steps may follow each other."""


@dataclass(frozen=True)
class Step:
    """One row of STEPS."""

    kind: Kind
    place: str
    """`module:function`."""
    summary: str
    calibrated: bool = True
    """Whether it looks at calibration rows."""


STEPS: dict[str, Step] = {
    "awq": Step("transform", "gori.quantize.awq:awq", "scale the inputs that matter, folded into the op before"),
    "smoothquant": Step(
        "transform", "gori.quantize.smoothquant:smoothquant", "move outliers of int8 activations into the weights"
    ),
    "rotate": Step(
        "transform", "gori.quantize.rotate:rotate", "Hadamard rotations folded into the weights", calibrated=False
    ),
    "rtn": Step("rounding", "gori.quantize.rtn:rtn_step", "nearest, scales hold the largest weight", calibrated=False),
    "mse": Step("rounding", "gori.quantize.rtn:mse_step", "nearest, scales of least squared error", calibrated=False),
    "hqq": Step("rounding", "gori.quantize.hqq:hqq", "nearest, half-quadratic scale search", calibrated=False),
    "gptq": Step("rounding", "gori.quantize.gptq:gptq", "each error passed on to the inputs that are still free"),
    "tune": Step("training", "gori.quantize.tune:tune", "scales and norms trained by KL to the float model (DWQ)"),
    "qat": Step("training", "gori.quantize.qat:qat", "integers and scales trained by KL to the float model"),
}
"""Step's name → its row, in the order in which steps may follow each other."""

DEFAULT_ROUNDING = {"transform": "mse", "training": "gptq"}
"""What rounds where a method names no rounding: `awq` is `awq+mse`, `tune` is `gptq+tune`."""
SAMPLES = 256
"""Calibration rows where nothing else was asked for."""
TRAINING_SAMPLES = 1024
"""The same for methods that end in a training: it overfits fewer (docs/quantization.md)."""
SENSITIVITY_ROWS = 64
"""Of these, rows that mixed precision measures each weight's sensitivity on."""
GIVEN = {"model", "batches", "spec", "tensors", "teacher", "start", "on_disk", "seed"}
"""Arguments of steps that are not the user's to set."""
EXAMPLES = (
    "rtn",
    "mse",
    "hqq",
    "gptq",
    "awq+gptq",
    "rotate+gptq",
    "smoothquant+mse",
    "tune",
    "qat",
    "rotate+gptq+tune",
)


@dataclass(frozen=True)
class Method:
    """A method that was read: canonical name and steps."""

    transforms: tuple[str, ...]
    rounding: str
    training: str | None

    @property
    def name(self) -> str:
        return "+".join((*self.transforms, self.rounding, *((self.training,) if self.training else ())))

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(self.name.split("+"))

    @property
    def samples(self) -> int:
        """Calibration rows where nothing else was asked for."""
        return TRAINING_SAMPLES if self.training else SAMPLES

    @property
    def calibrated(self) -> bool:
        """Whether calibration rows are needed."""
        return any(STEPS[s].calibrated for s in self.steps)


def method(text: str) -> Method:
    """Read `[transform+…][rounding][+training]`; an unknown step or another order is refused."""
    names = text.split("+")
    for name in names:
        if name not in STEPS:
            raise GoriError(f"method {text!r}: step {name!r} is unknown{nearest(name, STEPS)}")
    kinds = [STEPS[n].kind for n in names]
    places = [KINDS.index(k) for k in kinds]
    twice = len(set(names)) < len(names) or kinds.count("rounding") > 1 or kinds.count("training") > 1
    if twice or places != sorted(places):
        raise GoriError(
            f"method {text!r}: steps are transforms, then one rounding, then one training, each once, "
            "as in rotate+gptq+tune"
        )
    rounding = next((n for n in names if STEPS[n].kind == "rounding"), None) or DEFAULT_ROUNDING[kinds[-1]]
    training = next((n for n in names if STEPS[n].kind == "training"), None)
    return Method(tuple(n for n in names if STEPS[n].kind == "transform"), rounding, training)


def function(step: str) -> Callable[..., Any]:
    """The function of a step, imported now."""
    return named(STEPS[step].place)


def options(m: Method, given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`gptq.damping=0.05` and the like as step → keyword arguments; each is checked against what the step takes."""
    found: dict[str, dict[str, Any]] = {s: {} for s in m.steps}
    for text in given:
        key, eq, value = text.partition("=")
        step, dot, name = key.partition(".")
        if not (eq and dot and name):
            raise GoriError(f"--option {text!r}: expected STEP.NAME=VALUE, as in gptq.damping=0.05")
        if step not in found:
            raise GoriError(f"--option {text!r}: method {m.name} has no step {step!r}{nearest(step, found)}")
        allowed = settable(step)
        if name not in allowed:
            raise GoriError(f"--option {text!r}: {step} takes no {name!r}{nearest(name, allowed)}")
        found[step][name] = _typed(value, allowed[name], text)
    return found


def settable(step: str) -> dict[str, Any]:
    """Keyword arguments of a step with their defaults."""
    parameters = inspect.signature(function(step)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in GIVEN}


def _typed(value: str, default: Any, text: str) -> Any:
    kind = type(default)
    if kind is bool:
        if value not in ("true", "false"):
            raise GoriError(f"--option {text!r}: expected true or false")
        return value == "true"
    try:
        return kind(value)
    except ValueError as e:
        raise GoriError(f"--option {text!r}: expected {kind.__name__}, as in {default!r}") from e
