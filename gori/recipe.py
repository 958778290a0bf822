"""recipe.yaml: what a run is made of, as pydantic models. Unknown keys are refused with the nearest known one.

Config is data: stages unpack these sections into arguments and do not pass them on to algorithms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gori.errors import GoriError, nearest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where the conversations are."""

    builtin: Literal["incar"] | None = None
    """The built-in in-car task, made from the seed; then no file is named."""
    rows: int = Field(default=30000, ge=100)
    """Training rows of the built-in task."""
    test_rows: int = Field(default=300, ge=10)
    """Rows of each test split of the built-in task."""
    train: str | None = None
    dev: str | None = None
    test: str | list[str] = []
    """One file or several; each is a split named after the file."""
    tools: str | None = None


class TokenizerSection(Section):
    vocab_size: int = Field(default=2048, ge=300)


class Train(Section):
    """One training run; see gori.teacher.train.TrainSettings for each field."""

    steps: int = Field(default=600, ge=1)
    batch_tokens: int = Field(default=1024, ge=16)
    muon_lr: float = Field(default=4e-3, gt=0)
    adam_lr: float = Field(default=4e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=30, ge=0)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    muon_steps: int = Field(default=5, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    evaluate_every: int = Field(default=0, ge=0)
    swap_values: float = Field(default=0.0, ge=0, le=1)
    """Share of rows whose string values are swapped, in utterance and call, for other values of the same argument."""
    invent_values: float = Field(default=0.0, ge=0, le=1)
    """Share of the swapped rows whose open arguments get invented words, so that every token is copied sometimes."""
    checkpoint_every_s: float = Field(default=20.0, ge=0)
    compile: bool = False
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; null: one for each core (under ranks: as many as torchrun gives each)."""
    accumulate: int = Field(default=1, ge=1)
    recompute: bool = False
    precision: Literal["float32", "bf16"] | None = None
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one device could do, for the utilisation in logs; null: from a table of GPUs, and none on a CPU."""
    tensorboard: bool = False
    """Write OUT/logs for TensorBoard too."""


class TeacherTrain(Train):
    """A teacher's training run: also from token shards, and with its experts divided over ranks."""

    tokens: str | None = None
    """A folder that `gori data tokens` wrote: train on its sequences, every token predicted, not on data.train."""
    sequence: int = Field(default=2048, ge=2)
    """Tokens of one sequence of `tokens`."""
    expert_parallel: int = Field(default=1, ge=1)


class Shape(Section):
    """A decoder's shape."""

    hidden_size: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    head_dim: int = Field(default=32, ge=2)
    intermediate_size: int = Field(default=256, ge=8)
    tied: bool = True
    init_std: float = Field(default=0.02, gt=0)
    max_position: int = Field(default=256, ge=16)
    rope_theta: float = Field(default=1e6, gt=1)
    """A large one leaves more of a small head's dimensions free of position, to match content with."""
    induction: bool = True
    """Start random weights with a circuit that copies (gori.induction)."""


class Teacher(Shape):
    """A mixture of experts that is trained, or a folder that is taken."""

    path: str | None = None
    """A checkpoint folder with the same tokenizer, or what `gori teacher import` wrote; then nothing is trained."""
    experts: int = Field(default=8, ge=2)
    experts_per_token: int = Field(default=2, ge=1)
    balance: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing auxiliary loss."""
    train: TeacherTrain = TeacherTrain()


class Cache(Section):
    """A teacher's few entries at each answer token, written once; see gori.teacher.cache_draw."""

    path: str | None = None
    """A finished cache, which is taken as it is."""
    method: Literal["sample", "topk"] = "sample"
    """The most probable tokens and draws of the others, without bias, or the most probable ones and a tail."""
    k: int = Field(default=32, ge=1, le=255)
    """Entries a token, at most; a sure teacher's tokens need 12 of 32 on average."""
    epochs: int = Field(default=1, ge=1)
    """Different epochs of rows, which the student goes through in turn."""
    shard_rows: int = Field(default=1024, ge=1)
    batch_tokens: int = Field(default=4096, ge=16)
    """Padded tokens that the teacher reads at once."""


class Student(Shape):
    kind: Literal["llama", "qwen2", "qwen3"] = "qwen3"


class Experts(Section):
    """How a dense MLP is made of a mixture's experts."""

    score: Literal["use", "output"] = "use"
    """What chooses experts: their share of the routing, or that times the size of what they put out."""
    how: Literal["neurons", "select", "merge"] = "neurons"
    """neurons: the ones that matter most, of all experts. select: whole experts. merge: every other expert is averaged
    into the chosen one that it is routed like."""


class Step(Section):
    """A student between the teacher and the last one; it lacks nothing that the next one takes."""

    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=8)
    intermediate_size: int = Field(ge=8)
    steps: int = Field(ge=1)


class OnPolicy(Section):
    """Steps whose answers the student draws itself."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Of the steps after `start`."""
    temperature: float = Field(default=1.0, gt=0)
    start: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps before it: a student that says nothing sensible yet has nothing to be told about it."""


class Unlabelled(Section):
    """Requests without answers: JSON Lines whose conversations end with the user's words, or lines of text."""

    files: list[str] = Field(min_length=1)
    answers: Literal["teacher", "student"] = "teacher"
    """teacher: it answers them once, and those answers that are valid calls are training rows. student: the prompts of
    the on-policy steps."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Of an epoch's rows, where the teacher answers; the fewer are repeated."""
    temperature: float = Field(default=0.0, ge=0)
    """0: the teacher's likeliest answers; above, drawn ones."""


class Distill(Section):
    """How the student learns."""

    init: Literal["teacher", "random"] = "teacher"
    layers: list[int] | None = None
    """Teacher layers that the student takes; null: as `depth` says."""
    depth: Literal["perplexity", "even", "influence"] = "perplexity"
    """Layers that the teacher misses most, evenly spaced ones, or those that change the residual stream most."""
    width: Literal["importance", "pca"] = "importance"
    """Dimensions of the residual stream that are used most, or its principal directions (needs an untied head)."""
    experts: Experts = Experts()
    fit: bool = True
    """What each layer writes is fitted to the teacher's residual stream by least squares, and neurons chosen for it."""
    progressive: list[Step] = []
    """Students on the way, each taken from the one before and distilled from the teacher."""
    losses: dict[str, float] = {"forward_kl": 1.0}
    """Weights of forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl (`jsd@0.3` sets its parameter), ce, and of
    hidden, cosine, attention."""
    pairs: list[tuple[int, int]] | None = None
    """Layers [student, teacher] that hidden, cosine and attention compare; null: all but the first, as deep."""
    on_policy: OnPolicy | None = None
    unlabelled: Unlabelled | None = None
    labelled_rows: int | None = Field(default=None, ge=1)
    """The first rows of data.train alone; null: all."""
    tokenizers: Literal["align", "sequence"] | None = None
    """For a teacher with another tokenizer: its distribution, carried over by bytes, or the answers that it writes."""
    temperature: float = Field(default=1.0, gt=0)
    teacher_until: float = Field(default=1.0, gt=0, le=1)
    """Share of the steps with these losses; after it the true answers alone, which pays where the student overtakes."""
    train: Train = Train()
    control: Literal["none", "random", "teacher"] = "random"
    """A control run with the same steps on the true answers alone (ce), from these first weights; none: no control."""


class Quantize(Section):
    scheme: str = "w4a8-g32"
    """The scheme that is exported."""
    embedding: str | None = None
    """The embedding table's scheme; null: the linear scheme's bits and groups."""
    method: str = "rtn"
    """Round-to-nearest with scales that hold each group's largest weight, or any other that `gori quantize` takes."""
    samples: int | None = Field(default=None, ge=1)
    """Training rows that a method is calibrated with; null: as many as it wants."""
    options: list[str] = []
    """Settings of the method's steps, as in gptq.damping=0.05."""
    mix: str | None = None
    """Mixed precision for the scheme that is exported: a target whose schemes are mixed, or schemes with commas."""
    bits_per_weight: float | None = Field(default=None, gt=1)
    """Budget of `mix`, scales included."""
    compare: list[str] = []
    """Further schemes that are made and evaluated, not exported."""


class Export(Section):
    target: Literal["executorch", "litert", "tflite", "coreml", "gguf", "atom-max"] = "executorch"
    context: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer in tokens; null: the student's max_position, at most 512."""
    chunk: int | None = Field(default=None, ge=1)
    """Tokens that one call takes at most; null: 128."""
    backend: str | None = None
    """A variant, as `gori export --backend` takes it."""


class Budget(Section):
    """What an exported file may cost."""

    bytes: int | None = None
    """Of the largest exported file."""


class Recipe(Section):
    name: str
    seed: int = 0
    data: Data
    tokenizer: TokenizerSection = TokenizerSection()
    teacher: Teacher = Teacher()
    cache: Cache | None = None
    student: Student = Student()
    distill: Distill = Distill()
    quantize: Quantize = Quantize()
    export: list[Export] = [Export()]
    gates: dict[str, str] = {}
    """`"accuracy.executorch.test.exact": ">= 0.8"`: a dotted path into summary.json, or a ratio of two with ` / `."""
    budget: Budget = Budget()

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher is trained or taken: not where its finished cache is all that is wanted of it."""
        wanted = self.teacher.path or "teacher" in (self.distill.init, self.distill.control)
        return bool(wanted) or not (self.cache and self.cache.path)


def load(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `KEY=VALUE` overrides (dotted keys, YAML values); file paths are relative to it."""
    try:
        body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise GoriError(f"recipe {path} does not exist: `gori init DIR` writes one") from e
    except OSError as e:
        raise GoriError(f"recipe {path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise GoriError(f"recipe {path} is not UTF-8 at byte {e.start}") from e
    except yaml.YAMLError as e:
        raise GoriError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(body, dict):
        raise GoriError(f"recipe {path} must be a mapping of sections, got {type(body).__name__}")
    body = _unshared(body)
    _resolve_paths(body, Path(path).parent)
    for override in overrides:
        _override(body, override)
    return parse(body, str(path))


def parse(body: dict[str, Any], source: str) -> Recipe:
    """Validate a recipe's content; each problem is one sentence."""
    try:
        recipe = Recipe.model_validate(body)
    except ValidationError as e:
        raise GoriError(f"{source}: {_sentence(e)}") from e
    _check_data(recipe.data, source)
    return recipe


def _unshared(part: Any) -> Any:
    """Sections of their own where YAML's aliases (`train: *same`) made one, so that an override reaches one alone."""
    if isinstance(part, dict):
        return {k: _unshared(v) for k, v in part.items()}
    return [_unshared(v) for v in part] if isinstance(part, list) else part


def _resolve_paths(body: dict[str, Any], base: Path) -> None:
    def resolve(p: Any) -> Any:
        if isinstance(p, list):
            return [resolve(x) for x in p]
        return str(base / p) if isinstance(p, str) else p

    for section, keys in (("data", ("train", "dev", "test", "tools")), ("teacher", ("path",)), ("cache", ("path",))):
        if isinstance(body.get(section), dict):
            body[section] |= {k: resolve(body[section][k]) for k in keys if body[section].get(k)}
    unlabelled = body["distill"].get("unlabelled") if isinstance(body.get("distill"), dict) else None
    if isinstance(unlabelled, dict) and unlabelled.get("files"):
        unlabelled["files"] = resolve(unlabelled["files"])
    train = body["teacher"].get("train") if isinstance(body.get("teacher"), dict) else None
    if isinstance(train, dict) and train.get("tokens"):
        train["tokens"] = resolve(train["tokens"])


def _override(body: dict[str, Any], override: str) -> None:
    key, eq, value = override.partition("=")
    if not eq or not key:
        raise GoriError(f"--set {override!r}: expected KEY=VALUE, as in --set distill.train.steps=500")
    *parents, leaf = key.split(".")
    try:
        new = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise GoriError(f"--set {override!r}: the value is not YAML ({' '.join(str(e).split())})") from e
    at: Any = body
    for part in parents:
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}
        at = at[_place(at, part, override)]
    at[_place(at, leaf, override)] = new


def _place(at: Any, part: str, override: str) -> Any:
    """The key of a section, or the index of a list that is long enough."""
    if isinstance(at, dict):
        return part
    if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
        return int(part)
    shown = f"a list of {len(at)}: name one of 0..{len(at) - 1}" if isinstance(at, list) else f"{at!r}, no section"
    raise GoriError(f"--set {override!r}: what holds {part!r} is {shown}")


def _sentence(e: ValidationError) -> str:
    first = e.errors()[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] != "extra_forbidden":
        more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
        return f"{place}: {first['msg']}, got {first.get('input')!r}{more}"
    model: Any = Recipe
    for part in first["loc"][:-1]:
        if isinstance(part, str):
            model = _inner(model.model_fields[part].annotation)
    return f"unknown key {place}{nearest(str(first['loc'][-1]), model.model_fields)}"


def _inner(annotation: Any) -> Any:
    """The section model inside an annotation such as `list[Export]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(a for a in annotation.__args__ if isinstance(a, type) and issubclass(a, BaseModel))


def _check_data(d: Data, source: str) -> None:
    named = [k for k in ("train", "dev", "tools") if getattr(d, k)]
    if d.builtin and named:
        raise GoriError(f"{source}: data.builtin makes its own files, so data.{named[0]} cannot be named with it")
    if not d.builtin and (missing := [k for k in ("train", "dev", "tools", "test") if not getattr(d, k)]):
        raise GoriError(f"{source}: data.{missing[0]} is missing: name a file, as in --set data.{missing[0]}=FILE")
