"""The quantize stage: a float student's folder + a scheme → the quantized checkpoint, with what it costs in bytes."""

from __future__ import annotations

from pathlib import Path

from gori import checkpoint, quantized
from gori.artifact import Manifest, ancestry, content_hash, make
from gori.errors import GoriError
from gori.quantize.rtn import rtn
from gori.quantize.schemes import canonical, embedding_scheme, scheme
from gori.tokenizer import copy_files


def quantize(checkpoint_dir: Path, scheme_name: str, embedding: str | None, method: str, out: Path) -> bool:
    """Write the quantized checkpoint of a float folder into `out`; returns whether it ran."""
    scheme(scheme_name)
    if embedding is not None:
        embedding_scheme(embedding)
    if quantized.is_quantized(checkpoint_dir):
        raise GoriError(f"{checkpoint_dir} is quantized already: quantize the float student that it was made from")
    settings = {"scheme": canonical(scheme_name), "embedding": embedding, "method": method}
    manifest = Manifest("quantize", settings["scheme"] or "", 0, settings, {"checkpoint": content_hash(checkpoint_dir)})
    manifest.lineage = ancestry({"checkpoint": checkpoint_dir})

    def build(tmp: Path) -> None:
        model = checkpoint.load(checkpoint_dir)
        tensors, spec = rtn(model, scheme_name, embedding, method)
        quantized.save(model, tensors, spec, tmp)
        copy_files(checkpoint_dir, tmp)
        floats = sum(p.numel() for n, p in model.named_parameters() if checkpoint.to_hf_name(n) not in spec.tensors)
        packed = sum(t.packed_bytes() for t in tensors.values())
        manifest.metrics |= {
            "packed_bytes": packed,
            "float_bytes": 4 * floats,
            "tensors": len(tensors),
            "bits_per_weight": round(8 * packed / sum(t.q.numel() for t in tensors.values()), 3),
        }
        manifest.notes += [f"{name} stayed float: {why}" for name, why in spec.float_tensors.items()]

    return make(out, manifest, build)
