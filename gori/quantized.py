"""The quantized checkpoint: integers and scales on disk, and eager modules that compute with exactly those.

Knows how a quantized tensor is stored and used, not how its integers were chosen (that is quantize/). Layout of
`model.safetensors`: `<weight>.q` int8 `[out, in]`, or for fewer bits uint8 `[out, in * bits / 8]`, packed from the low
bits up (4: two values a byte, low nibble first); `<weight>.scale` float16 `[out, groups]`. `quantization.json` says
bits, group size and activations per tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gori import checkpoint
from gori.artifact import read_object, write_json
from gori.errors import GoriError
from gori.model import Decoder

SCHEMA = "quantization.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class TensorScheme:
    """How one weight is held: symmetric integers of `bits`, one scale per `group_size` inputs (0: per channel)."""

    bits: int
    group_size: int
    activation_bits: int
    """8: inputs are quantized per token, asymmetric int8, at run time; 16: they stay float."""


@dataclass
class Quantization:
    """The content of quantization.json."""

    scheme: str
    embedding: str
    method: str
    tensors: dict[str, TensorScheme]
    shared_head: bool
    """Whether the head uses the embedding's integers."""
    head_activation_bits: int = 16
    """Activation bits of a shared head (a head apart has its own entry in `tensors`)."""
    float_tensors: dict[str, str] = field(default_factory=dict)
    """What stayed float → why."""
    calibration: dict[str, Any] | None = None
    """Hash and size of the calibration data; None where the method used none."""


@dataclass
class QuantizedTensor:
    """Integers int8 `[out, in]` in [-2^(bits-1), 2^(bits-1)-1] and float32 scales `[out, groups]`."""

    q: Tensor
    scale: Tensor
    scheme: TensorScheme

    def dequantize(self) -> Tensor:
        """float32 `[out, in]`: integer times its group's scale."""
        out, width = self.q.shape
        return self.q.float().view(out, self.scale.shape[1], -1).mul_(self.scale.unsqueeze(-1)).view(out, width)

    def packed_bytes(self) -> int:
        """Bytes of the integers packed and the scales at 16 bits."""
        return packed_bytes(self.q.shape, self.scheme)


def packed_bytes(shape: Sequence[int], s: TensorScheme) -> int:
    """Bytes of a weight `[out, in]` under a scheme: integers packed row by row, scales at 16 bits."""
    out, width = shape
    return out * (width * s.bits // 8 + 2 * (width // s.group_size if s.group_size else 1))


def pack_int4(q: Tensor) -> Tensor:
    """int8 `[out, in]` in [-8, 7] → uint8 `[out, in/2]`, low nibble first."""
    u = (q & 0xF).to(torch.uint8)
    return u[:, 0::2] | (u[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    high = torch.stack((packed << 4, packed & 0xF0), dim=-1).flatten(-2).view(torch.int8)
    return high.bitwise_right_shift_(4)  # of int8: the sign comes along


def pack(q: Tensor, bits: int) -> Tensor:
    """int8 `[out, in]` of `bits` → as it is stored: int8 for 8 bits, else uint8 `[out, in * bits / 8]`, each row a
    stream of bits from the lowest up; for 4 bits that is `pack_int4`."""
    if bits == 8:
        return q
    if bits == 4:
        return pack_int4(q)
    planes = (q.numpy().view(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(len(q), -1), axis=1, bitorder="little"))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int8 `[out, in]`."""
    if bits == 8:
        return packed
    if bits == 4:
        return unpack_int4(packed)
    flat = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
    value = (flat.reshape(len(packed), -1, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)
    return torch.from_numpy((value << (8 - bits)).view(np.int8) >> (8 - bits))  # of int8: the sign comes along


def quantize_activations(x: Tensor) -> Tensor:
    """Round float32 `[..., D]` to per-token asymmetric int8 and back, as XNNPACK's qd8 inputs and
    `quantized_decomposed.choose_qparams_per_token_asymmetric` do: the range includes zero, 255 steps."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    from_low, from_high = -128 - low / scale, 127 - high / scale
    error = (-128 + low / scale) + (127 + high / scale)
    zero = torch.where(error > 0, from_low, from_high).clamp(-128, 127).round()
    return ((x * (1.0 / scale)).round() + zero).clamp(-128, 127).sub(zero) * scale


def round_q8_0(x: Tensor) -> Tensor:
    """Round float32 `[..., D]` to symmetric int8 in blocks of 32 with float16 scales and back, as llama.cpp does to the
    input of every product with Q4_0 and Q8_0 weights (ggml's `quantize_row_q8_0` on x86: products with 127 / largest,
    halves to even). Its portable C and its ARM code multiply with 1 / scale, so a value at a half may differ there."""
    blocks = x.unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    q = (blocks * torch.where(largest > 0, 127 / largest, 0)).round()
    return (q * (largest / 127).half().float()).flatten(-2)


ROUNDINGS = ("scheme", "none", "q8_0")
"""How an engine rounds a quantized linear's input: as the scheme says, not at all, or in llama.cpp's blocks."""


def round_input(x: Tensor, activation_bits: int, rounding: str) -> Tensor:
    """The input of a quantized linear as an engine sees it; `rounding` is one of ROUNDINGS."""
    if rounding == "q8_0":
        return round_q8_0(x)
    return quantize_activations(x) if rounding == "scheme" and activation_bits == 8 else x


class QuantizedLinear(nn.Module):
    """A linear layer that computes with a QuantizedTensor's dequantized integers (and rounded inputs)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, t: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.rounding = t.scheme, "scheme"
        self.register_buffer("weight", t.dequantize(), persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_input(x, self.scheme.activation_bits, self.rounding), self.weight, self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding table of integers; as a tied head it multiplies with the same dequantized rows."""

    weight: Tensor

    def __init__(self, t: QuantizedTensor, head_activation_bits: int = 16) -> None:
        super().__init__()
        self.scheme, self.head_activation_bits, self.rounding = t.scheme, head_activation_bits, "scheme"
        self.register_buffer("weight", t.dequantize(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def as_head(self, hidden: Tensor) -> Tensor:
        return F.linear(round_input(hidden, self.head_activation_bits, self.rounding), self.weight)


def quantizable(model: Decoder) -> dict[str, nn.Linear]:
    """Hugging Face weight name → linear layer, of every linear but the head."""
    if model.moe_layers():
        raise GoriError("a mixture of experts is not quantized: distill a dense student and quantize that")
    names = {checkpoint.to_hf_name(f"{n}.weight"): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names.pop(HEAD, None)
    return names


def apply(model: Decoder, tensors: dict[str, QuantizedTensor], spec: Quantization) -> Decoder:
    """Replace a float decoder's modules by quantized ones, in place; returns it.

    A tied head that is not shared becomes an `lm_head` of its own, and `cfg.tied` false.
    """
    for name in spec.tensors:
        if name in (EMBEDDING, HEAD):
            continue
        path = name.removeprefix("model.").removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        old = model.get_submodule(path)
        bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(tensors[name], bias))
    if not spec.shared_head and model.cfg.tied:
        head = nn.Linear(model.cfg.hidden_size, model.cfg.vocab_size, bias=False, device="meta")
        head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone())  # type: ignore[union-attr,operator]
        model.lm_head, model.cfg = head, replace(model.cfg, tied=False)
    if EMBEDDING in spec.tensors:
        model.embed_tokens = QuantizedEmbedding(tensors[EMBEDDING], spec.head_activation_bits)
    if HEAD in spec.tensors:
        model.lm_head = QuantizedLinear(tensors[HEAD])
    return model.eval()


def save(model: Decoder, tensors: dict[str, QuantizedTensor], spec: Quantization, directory: Path) -> None:
    """Write config.json, model.safetensors and quantization.json of a *float* decoder and its integers."""
    stored: dict[str, Tensor] = {}
    for name, t in checkpoint.hf_tensors(model).items():
        if name not in spec.tensors:
            stored[name] = t
    for name, t in tensors.items():
        stored[f"{name}.q"] = pack(t.q, t.scheme.bits).contiguous()
        stored[f"{name}.scale"] = t.scale.to(torch.float16).contiguous()
        if not torch.equal(stored[f"{name}.scale"].float(), t.scale):
            raise AssertionError(f"scale of {name} is not exact in float16")
    write_json(directory / "config.json", checkpoint.config_to_hf(model.cfg))
    checkpoint.write_tensors(stored, directory / checkpoint.WEIGHTS)
    body = asdict(spec) | {"tensors": {k: asdict(v) for k, v in sorted(spec.tensors.items())}}
    write_json(directory / SCHEMA, body)


def is_quantized(directory: Path) -> bool:
    return (directory / SCHEMA).exists()


def read(directory: Path) -> tuple[Quantization, dict[str, QuantizedTensor], dict[str, Tensor]]:
    """quantization.json, the quantized tensors, and the float ones under their Hugging Face names."""
    body = read_object(directory / SCHEMA)
    try:
        spec = Quantization(**body)
        spec.tensors = {k: TensorScheme(**v) for k, v in body["tensors"].items()}
    except (TypeError, KeyError, AttributeError) as e:
        raise GoriError(f"{directory / SCHEMA} does not have the fields of gori's quantization.json: {e}") from e
    raw = checkpoint.read_tensors(directory)
    tensors = {name: _read_tensor(raw, name, scheme, directory) for name, scheme in spec.tensors.items()}
    return spec, tensors, raw


def _read_tensor(raw: dict[str, Tensor], name: str, scheme: TensorScheme, directory: Path) -> QuantizedTensor:
    try:
        q, scale = raw.pop(f"{name}.q"), raw.pop(f"{name}.scale").float()
    except KeyError as e:
        raise GoriError(f"{directory} lacks the tensor {e.args[0]} that {SCHEMA} names") from e
    q = unpack(q, scheme.bits)
    groups = q.shape[1] // scheme.group_size if scheme.group_size else 1
    if scale.shape != (q.shape[0], groups):
        raise GoriError(f"{directory}: {name}.scale has shape {list(scale.shape)}, expected {[q.shape[0], groups]}")
    if not ((scale > 0) & (scale == scale.to(torch.bfloat16).float())).all():
        raise GoriError(
            f"{directory}: {name}.scale holds values that are not positive numbers of a bfloat16's precision, which "
            "every target keeps exactly: quantize again with gori"
        )
    return QuantizedTensor(q, scale, scheme)


def load(directory: Path, rounding: str = "scheme") -> Decoder:
    """A decoder from a float or quantized folder; the quantized one computes with its stored integers, and rounds the
    inputs of quantized linears as `rounding`, one of ROUNDINGS, says."""
    directory = Path(directory)
    if not is_quantized(directory):
        return checkpoint.load(directory)
    cfg = checkpoint.read_config(directory)
    spec, tensors, raw = read(directory)
    # places without content: `apply` puts a module of integers there, and no second copy of the weights is made
    floats = raw | {k: torch.empty(t.q.shape, device="meta") for k, t in tensors.items()}
    model = apply(checkpoint.load_tensors(cfg, floats, directory, torch.float32), tensors, spec)
    for m in model.modules():
        if isinstance(m, (QuantizedLinear, QuantizedEmbedding)):
            m.rounding = rounding
    return model
