"""The quantize stage: a float student's folder + a scheme + a method → the quantized checkpoint, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gori import checkpoint, quantized
from gori.artifact import Manifest, ancestry, content_hash, make
from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize import calibration as data
from gori.quantize.layout import bits_per_weight, layout
from gori.quantize.methods import Method, function, method, options
from gori.quantize.schemes import canonical, embedding_scheme, scheme
from gori.quantized import Quantization, QuantizedTensor
from gori.tokenizer import Tokenizer, copy_files

if TYPE_CHECKING:
    from gori.quantize.mix import Mix


@dataclass(frozen=True)
class Rows:
    """Where calibration rows come from."""

    files: tuple[Path, ...]
    tools: Path
    samples: int

    def read(self, source: Path, seed: int) -> data.Calibration:
        """The sample in the checkpoint's own tokens."""
        if not (source / "tokenizer.json").exists():
            raise GoriError(f"{source} has no tokenizer.json: rows of text cannot be read in its tokens")
        longest = checkpoint.read_config(source).max_position
        tokenizer = Tokenizer.load(source)
        return data.sample(data.read_rows(self.files, self.tools), tokenizer, self.samples, longest, seed)


def rows_for(source: Path, files: Sequence[Path], samples: int) -> Rows:
    """The rows that were named, or the training rows beside the checkpoint; its tools file goes with them."""
    if files:
        tools = source / "tools.json"
        if not tools.exists():
            raise GoriError(f"{tools} does not exist: rows are checked against the tools that the model knows")
        return Rows(tuple(files), tools, samples)
    found = data.beside(source)
    return Rows(tuple(found["train"]), found["tools"][0], samples)


def quantize(
    checkpoint_dir: Path,
    scheme_name: str,
    embedding: str | None,
    method_name: str,
    out: Path,
    *,
    calibration: Sequence[Path] = (),
    samples: int | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    mix: Mix | None = None,
    teacher: Path | None = None,
    on_disk: Path | None = None,
) -> bool:
    """Write the quantized checkpoint of a float folder into `out`; returns whether it ran.

    `calibration` are files of conversations (default: the training rows of the run that the checkpoint came from), of
    which `samples` rows are drawn (default: as many as the method wants),
    `settings` options of the method's steps (`gptq.damping=0.05`), `mix` a budget for mixed precision in place of one
    scheme for all linears, `teacher` a checkpoint that qat learns from in place of the float student.
    """
    scheme(scheme_name)
    if embedding is not None:
        embedding_scheme(embedding)
    how = method(method_name)
    chosen = options(how, settings)
    if quantized.is_quantized(checkpoint_dir):
        raise GoriError(f"{checkpoint_dir} is quantized already: quantize the float student that it was made from")
    if teacher and how.training != "qat":
        raise GoriError(f"method {how.name} learns from the float student alone: --teacher goes with qat")
    asked: dict[str, Any] = {"scheme": canonical(scheme_name), "embedding": embedding, "method": how.name}
    inputs = {"checkpoint": content_hash(checkpoint_dir)}
    rows = rows_for(checkpoint_dir, calibration, samples or how.samples) if how.calibrated or mix else None
    if rows:
        asked |= {"samples": rows.samples, "options": chosen}
        inputs |= {f"calibration/{p.name}": content_hash(p) for p in rows.files}
    if mix:
        asked |= {"mix": asdict(mix)}
    if teacher:
        inputs["teacher"] = content_hash(teacher)
    manifest = Manifest("quantize", asked["scheme"], seed, asked, inputs)
    manifest.lineage = ancestry({"checkpoint": checkpoint_dir, **({"teacher": teacher} if teacher else {})})

    def build(tmp: Path) -> None:
        model = frozen(checkpoint.load(checkpoint_dir, mapped=True))
        sample = rows.read(checkpoint_dir, seed) if rows else None
        made = run(model, scheme_name, embedding, how, chosen, sample, seed, mix, teacher, on_disk)
        if sample:
            found = {"sha256": sample.sha256, "rows": sample.rows, "tokens": sample.tokens}
            made.spec.calibration = found
            manifest.metrics["calibration"] = {**found, **_fidelity(model, sample, made)}
        quantized.save(made.model, made.tensors, made.spec, tmp)
        copy_files(checkpoint_dir, tmp)
        note(manifest, made)

    return make(out, manifest, build)


@dataclass
class Made:
    """What a method made."""

    model: Decoder
    """The float decoder whose norms, biases and float tables are stored beside the integers."""
    tensors: dict[str, QuantizedTensor]
    spec: Quantization
    facts: dict[str, Any]


def run(
    model: Decoder,
    scheme_name: str,
    embedding: str | None,
    how: Method,
    chosen: dict[str, dict[str, Any]],
    sample: data.Calibration | None,
    seed: int,
    mix: Mix | None = None,
    teacher: Path | None = None,
    on_disk: Path | None = None,
) -> Made:
    """A method's steps one after the other on a float decoder, which stays as it is."""
    batches = sample.batches if sample else []
    facts: dict[str, Any] = {}

    def laid_out(m: Decoder) -> Quantization:
        if mix is None:
            return layout(m, scheme_name, embedding)
        from gori.quantize.mix import mixed_layout

        spec, facts["mix"] = mixed_layout(m, mix, batches)
        return spec

    given: dict[str, Any] = {"on_disk": on_disk}
    for step in how.transforms:
        extra = {"seed": seed} if step == "rotate" else {"batches": batches, "spec": laid_out(model), **given}
        model = frozen(function(step)(model, **extra, **chosen[step]))
    spec = replace(laid_out(model), method=how.name)
    extra = {"batches": batches, **given} if how.rounding == "gptq" else {}
    tensors = function(how.rounding)(model, spec=spec, **extra, **chosen[how.rounding])
    if how.training:
        extra = {"seed": seed, **given}
        if how.training == "qat":
            extra |= {"teacher": frozen(checkpoint.load(teacher, mapped=True)) if teacher else None, "start": tensors}
        else:
            extra |= {"tensors": tensors}
        trained = function(how.training)(model, spec=spec, batches=batches, **extra, **chosen[how.training])
        tensors, model = trained.tensors, with_floats(model, trained.floats)
        facts["training"] = trained.log
    return Made(model, tensors, spec, facts)


def frozen(model: Decoder) -> Decoder:
    """The decoder itself, its weights without gradients."""
    return model.requires_grad_(False).eval()


def with_floats(model: Decoder, floats: dict[str, torch.Tensor]) -> Decoder:
    """A decoder that shares all weights but some, under gori's parameter names, which are others."""
    state = dict(model.state_dict()) | floats
    with torch.device("meta"):
        new = Decoder(model.cfg)
    new.load_state_dict(state, assign=True)
    new.rope_freq = model.rope_freq
    return frozen(new)


def _fidelity(model: Decoder, sample: data.Calibration, made: Made) -> dict[str, float]:
    """KL and agreement with the float model on the calibration rows: what the method saw, not a test."""
    from gori.quantize.fidelity import Reference

    copied = with_floats(made.model, {})
    return Reference(model, sample.batches).compare(quantized.apply(copied, made.tensors, made.spec)).summary()


def note(manifest: Manifest, made: Made) -> None:
    """Bytes, bits a weight, and what stayed float."""
    model, spec = made.model, made.spec
    floats = sum(p.numel() for n, p in model.named_parameters() if checkpoint.to_hf_name(n) not in spec.tensors)
    manifest.metrics |= {
        "packed_bytes": sum(t.packed_bytes() for t in made.tensors.values()),
        "float_bytes": 4 * floats,
        "tensors": len(made.tensors),
        "bits_per_weight": round(bits_per_weight(made.tensors), 3),
        **made.facts,
    }
    manifest.notes += [f"{name} stayed float: {why}" for name, why in spec.float_tensors.items()]
