"""Which weight of a decoder is held how: the scheme of every linear, of the table and of the head, before any integer.

A method takes a layout and fills it; mixed precision makes one tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from gori.errors import GoriError
from gori.model import Decoder
from gori.quantize.schemes import canonical, embedding_scheme, matching_embedding, scheme
from gori.quantized import EMBEDDING, HEAD, Quantization, QuantizedTensor, TensorScheme, quantizable


def layout(model: Decoder, scheme_name: str, embedding: str | None = None) -> Quantization:
    """Every linear of a float decoder in one scheme, the table in its own (`None`: the linears' bits and groups).

    A tied head shares the table's integers where bits and groups agree, and is a linear of its own where they do not.
    Raises GoriError where a scheme does not fit a layer's width.
    """
    scheme_name = canonical(scheme_name)
    s, embedding = scheme(scheme_name), embedding or matching_embedding(scheme_name)
    tensors = dict.fromkeys(quantizable(model), s)
    table = embedding_scheme(embedding)
    if table is not None:
        tensors[EMBEDDING] = table
    shared = model.cfg.tied and table is not None and (table.bits, table.group_size) == (s.bits, s.group_size)
    if not shared:
        tensors[HEAD] = s
    return checked(model, _spec(model, scheme_name, embedding, tensors, shared))


def mixed(model: Decoder, name: str, tensors: Mapping[str, TensorScheme]) -> Quantization:
    """A layout from a scheme for each weight's name; a tied head without an entry shares the table's integers."""
    shared = model.cfg.tied and HEAD not in tensors and EMBEDDING in tensors
    table = tensors.get(EMBEDDING)
    embedding = "float" if table is None else matching_embedding_of(table)
    spec = _spec(model, name, embedding, dict(tensors), shared)
    if shared:
        activations = {t.activation_bits for n, t in tensors.items() if n != EMBEDDING}
        spec = replace(spec, head_activation_bits=min(activations))
    return checked(model, spec)


def matching_embedding_of(s: TensorScheme) -> str:
    """The name of a table's scheme."""
    return f"w{s.bits}-{f'g{s.group_size}' if s.group_size else 'channel'}"


def _spec(model: Decoder, name: str, embedding: str, tensors: dict[str, TensorScheme], shared: bool) -> Quantization:
    floats = {n: "a norm or bias: one vector" for n, p in model.named_parameters() if p.dim() == 1}
    if embedding == "float":
        floats[EMBEDDING] = "--embedding float"
    activation_bits = min(s.activation_bits for n, s in tensors.items() if n != EMBEDDING)
    return Quantization(
        scheme=name,
        embedding=embedding,
        method="",
        tensors=tensors,
        shared_head=shared,
        head_activation_bits=activation_bits if shared else 16,
        float_tensors=floats,
    )


def checked(model: Decoder, spec: Quantization) -> Quantization:
    """The layout itself, refused where groups or packing do not fit a weight's width."""
    for name, s in spec.tensors.items():
        check_width(weight_of(model, name).shape[1], s, name)
    return spec


def check_width(width: int, s: TensorScheme, name: str) -> None:
    """Refuse a layer whose inputs the scheme's groups do not divide, or whose rows do not fill whole bytes."""
    if s.group_size and width % s.group_size:
        divisors = [d for d in range(1, width + 1) if width % d == 0]
        raise GoriError(
            f"group size {s.group_size} does not divide in_features {width} of {name}: "
            f"its divisors are {', '.join(map(str, divisors))}; choose such a width or a scheme ending in -channel"
        )
    if s.bits == 4 and width % 2:
        raise GoriError(f"in_features {width} of {name} is odd and int4 is stored in pairs: choose an 8-bit scheme")
    if width * s.bits % 8:
        raise GoriError(
            f"in_features {width} of {name} times {s.bits} bits is no number of whole bytes: choose a width that 8 "
            "divides, or an 8-bit scheme"
        )


def weight_of(model: Decoder, name: str) -> Tensor:
    """The float weight `[out, in]` under its Hugging Face name; a tied head's is the table."""
    if name == HEAD:
        weight = model.head.weight
    else:
        weight = model.get_submodule(name.removeprefix("model.").removesuffix(".weight")).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def bits_per_weight(tensors: Mapping[str, QuantizedTensor]) -> float:
    """Bits of packed integers and scales over the number of weights."""
    return 8 * sum(t.packed_bytes() for t in tensors.values()) / sum(t.q.numel() for t in tensors.values())
