"""Hugging Face folders in and out: config.json and safetensors of Llama, Qwen2, Qwen3 and Qwen3-MoE.

Knows nothing of tokenizers or quantization. Expert matrices are stacked in memory and stored one by one, the layout
that every reader of Qwen3-MoE accepts; the stacked layout is read too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gori.artifact import read_object, write_json
from gori.errors import GoriError, nearest
from gori.model import Decoder, Kind, ModelConfig, RopeScaling, rope_frequencies

WEIGHTS = "model.safetensors"
ARCHITECTURES: dict[Kind, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
# config.json fields that would change the network in a way gori/model.py does not compute, with the value it does
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "quantization_config": None,
    "pretraining_tp": 1,
}
_KNOWN = set(_ONLY) | {
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts",
    "num_experts_per_tok", "norm_topk_prob", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "initializer_range", "torch_dtype",
    "dtype", "transformers_version",
}  # fmt: skip


def config_from_hf(body: dict[str, Any], source: Path | str = "config.json") -> ModelConfig:
    """Read the fields of a Hugging Face config.json; what the decoder cannot compute is refused by name."""
    kind = body.get("model_type", "")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        near = nearest(str(kind), ARCHITECTURES)
        raise GoriError(f"{source}: model_type {kind!r} is not one that gori computes{near}")
    biased = kind == "qwen2"
    for key, allowed in {**_ONLY, "attention_bias": biased}.items():
        got = body.get(key, allowed)
        if got != allowed and not (key == "decoder_sparse_step" and kind != "qwen3_moe"):
            raise GoriError(f"{source}: {key} is {got!r}, gori's decoder computes {allowed!r} only for {kind}")
    moe = kind == "qwen3_moe"
    try:
        theta, scaling = _rope(body, source)
        heads = int(body["num_attention_heads"])
        return ModelConfig(
            kind=kind,
            vocab_size=int(body["vocab_size"]),
            hidden_size=int(body["hidden_size"]),
            layers=int(body["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(body.get("num_key_value_heads") or heads),
            head_dim=int(body.get("head_dim") or body["hidden_size"] // heads),
            intermediate_size=int(body["moe_intermediate_size" if moe else "intermediate_size"]),
            experts=int(body.get("num_local_experts") or body["num_experts"]) if moe else 0,
            experts_per_token=int(body["num_experts_per_tok"]) if moe else 0,
            norm_topk=bool(body.get("norm_topk_prob", False)),
            max_position=int(body["max_position_embeddings"]),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(body.get("rms_norm_eps", 1e-6)),
            tied=bool(body.get("tie_word_embeddings", False)),
            extra={k: v for k, v in body.items() if k not in _KNOWN},
        )
    except KeyError as e:
        raise GoriError(f"{source}: field {e.args[0]!r} is missing") from e
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise GoriError(f"{source}: a field is not the number it should be ({e})") from e


def _rope(body: dict[str, Any], source: Path | str) -> tuple[float, RopeScaling | None]:
    rope = {**(body.get("rope_scaling") or {}), **(body.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", body.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise GoriError(f"{source}: rope_type {kind!r} is not computed by gori: 'default' and 'llama3' are")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of a decoder, readable by transformers 4 and 5, llama.cpp's converter and MLX."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if r := cfg.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": r.factor,
            "low_freq_factor": r.low_freq_factor,
            "high_freq_factor": r.high_freq_factor,
            "original_max_position_embeddings": r.original_max_position,
        }
    body: dict[str, Any] = {
        **cfg.extra,
        "architectures": [ARCHITECTURES[cfg.kind]],
        "model_type": cfg.kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_position,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": {**rope, "rope_theta": cfg.rope_theta},
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "attention_bias": cfg.kind == "qwen2",
        "dtype": "float32",
    }
    if cfg.rope_scaling:
        body["rope_scaling"] = rope
    if cfg.experts:
        body |= {
            "moe_intermediate_size": cfg.intermediate_size,
            "num_experts": cfg.experts,
            "num_experts_per_tok": cfg.experts_per_token,
            "norm_topk_prob": cfg.norm_topk,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return body


def to_hf_name(name: str) -> str:
    """Our parameter name → the one in a Hugging Face file."""
    return name if name.startswith("lm_head") else f"model.{name}"


def hf_tensors(model: Decoder) -> dict[str, Tensor]:
    """Every weight under its Hugging Face name, contiguous, experts apart."""
    out: dict[str, Tensor] = {}
    for name, p in model.state_dict().items():
        if name.endswith("experts.gate_up"):
            for e, (gate, up) in enumerate(m.chunk(2) for m in p):
                stem = to_hf_name(name).removesuffix("gate_up")
                out[f"{stem}{e}.gate_proj.weight"], out[f"{stem}{e}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down"):
            stem = to_hf_name(name).removesuffix("down")
            out |= {f"{stem}{e}.down_proj.weight": m for e, m in enumerate(p)}
        else:
            out[to_hf_name(name)] = p
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in out.items()}


def save(model: Decoder, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors into an existing directory."""
    body = config_to_hf(model.cfg) | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", body)
    write_tensors({k: v.to(dtype) for k, v in hf_tensors(model).items()}, directory / WEIGHTS)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; a full disk, which the library reports as an error of its own kind, is one sentence."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        path.unlink(missing_ok=True)
        raise GoriError(f"cannot write {path}: {e}: free space or choose another --out") from e


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a folder's model.safetensors, or of the shards that its index names."""
    index = directory / f"{WEIGHTS}.index.json"
    shards = read_object(index).get("weight_map") if index.exists() else {"": WEIGHTS}
    if not isinstance(shards, dict):
        raise GoriError(f"{index} has no weight_map of tensors and files: copy the checkpoint again")
    names = sorted(set(shards.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = directory / name
        if not path.exists():
            raise GoriError(f"{path} does not exist: a checkpoint is a folder with config.json and {WEIGHTS}")
        try:
            with safe_open(path, framework="pt") as f:
                tensors |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        except (SafetensorError, OSError, ValueError) as e:
            raise GoriError(f"{path} is not a readable safetensors file ({e}): copy or train it again") from e
    return tensors


def _stack_experts(tensors: dict[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    found: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, t in tensors.items():
        if m := _EXPERT.fullmatch(name):
            found.setdefault(m[1], {})[int(m[2]), m[3]] = t
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name.removesuffix("_proj")] = t
        else:
            out[name] = t
    for stem, parts in found.items():
        if set(parts) != {(e, m) for e in range(cfg.experts) for m in ("gate", "up", "down")}:
            raise GoriError(f"{stem} has {len(parts)} matrices, {cfg.experts} experts need {3 * cfg.experts}")
        rows = range(cfg.experts)
        out[f"{stem}.gate_up"] = torch.stack([torch.cat((parts[e, "gate"], parts[e, "up"])) for e in rows])
        out[f"{stem}.down"] = torch.stack([parts[e, "down"] for e in rows])
    return out


def read_config(directory: Path) -> ModelConfig:
    """The decoder's shape from a folder's config.json."""
    if not directory.is_dir():
        raise GoriError(f"{directory} is not a directory: a checkpoint is a Hugging Face folder")
    return config_from_hf(read_object(directory / "config.json"), directory / "config.json")


def load(directory: Path, dtype: torch.dtype = torch.float32, mapped: bool = False) -> Decoder:
    """Read a Hugging Face folder into a decoder; every missing, spare or misshapen tensor is named.

    `mapped`: weights that are stored in `dtype` stay views of the file, which the system reads when they are used and
    may drop again: a model need not fit into memory. The file must not change meanwhile, nor the weights.
    """
    cfg = read_config(directory)
    return load_tensors(cfg, read_tensors(directory), directory, dtype, mapped)


def load_tensors(
    cfg: ModelConfig, raw: dict[str, Tensor], directory: Path, dtype: torch.dtype, mapped: bool = False
) -> Decoder:
    """Fill a decoder of shape `cfg` from tensors under their Hugging Face names."""
    tensors = {k.removeprefix("model."): v for k, v in _stack_experts(raw, cfg).items()}
    if cfg.tied:
        tensors.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = Decoder(cfg)
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise GoriError(f"{directory} lacks {len(missing)} tensors, {to_hf_name(missing[0])} among them")
    if spare := sorted(k for k in set(tensors) - set(wanted) if "rotary_emb" not in k):
        raise GoriError(
            f"{directory} holds {len(spare)} tensors that {cfg.kind} has no place for, {spare[0]} among them"
        )
    for name, p in wanted.items():
        if tuple(tensors[name].shape) != tuple(p.shape):
            got, want = list(tensors[name].shape), list(p.shape)
            raise GoriError(f"{directory}: {to_hf_name(name)} has shape {got}, config.json asks for {want}")
    # copies, unless asked for: what safetensors gives is a view of the mapped file
    model.load_state_dict({k: tensors[k].to(dtype, copy=not mapped) for k in wanted}, assign=True)
    model.rope_freq = rope_frequencies(cfg)
    return model.eval()
