"""Quantization schemes as data: the names that gori spells out and the names that other toolkits use for them."""

from __future__ import annotations

from gori.errors import GoriError, nearest
from gori.quantized import TensorScheme

GROUP_SIZES = {"channel": 0, "g32": 32, "g64": 64, "g128": 128}
BITS = (2, 3, 4, 5, 6, 8)
"""Widths of integers that a checkpoint holds; gori.targets says which a target's file holds."""

SCHEMES: dict[str, TensorScheme] = {
    f"w{bits}a{activation}-{granularity}": TensorScheme(bits, group, activation)
    for bits in BITS
    for activation in (8, 16)
    for granularity, group in GROUP_SIZES.items()
}
"""`w{bits}a{bits}-{granularity}`: symmetric integer weights; a8 quantizes activations per token at run time."""

EMBEDDINGS: dict[str, TensorScheme | None] = {
    "float": None,
    **{f"w{bits}-{g}": TensorScheme(bits, group, 16) for bits in BITS for g, group in GROUP_SIZES.items()},
}
"""The embedding table's schemes: rows are looked up, so there are no activations to quantize."""

ALIASES: dict[str, str] = {
    "8da4w": "w4a8-g32",  # torchao, ExecuTorch
    "int8_dynamic_activation_int4_weight": "w4a8-g32",  # torchao
    "int8_dynamic_activation_int8_weight": "w8a8-channel",  # torchao
    "8da8w": "w8a8-channel",  # ExecuTorch
    "int8_weight_only": "w8a16-channel",  # torchao
    "int4_weight_only": "w4a16-g128",  # torchao's default group
    "Q4_0": "w4a16-g32",  # llama.cpp
    "Q8_0": "w8a16-g32",  # llama.cpp
    "dynamic_wi8_afp32": "w8a8-channel",  # ai-edge-quantizer
    "dynamic_wi4_afp32": "w4a8-channel",  # ai-edge-quantizer
    "dynamic_wi4b32_afp32": "w4a8-g32",  # ai-edge-quantizer
    "weight_only_wi8_afp32": "w8a16-channel",  # ai-edge-quantizer
}


def scheme(name: str) -> TensorScheme:
    """The scheme of a name or alias; an unknown one is refused with the nearest."""
    name = ALIASES.get(name, name)
    if name not in SCHEMES:
        raise GoriError(f"scheme {name!r} is unknown{nearest(name, [*SCHEMES, *ALIASES])}")
    return SCHEMES[name]


def canonical(name: str) -> str:
    """The spelled-out name of a scheme or alias."""
    scheme(name)
    return ALIASES.get(name, name)


def embedding_scheme(name: str) -> TensorScheme | None:
    """The embedding table's scheme, None for float."""
    if name not in EMBEDDINGS:
        raise GoriError(f"embedding scheme {name!r} is unknown{nearest(name, EMBEDDINGS)}")
    return EMBEDDINGS[name]


def matching_embedding(scheme_name: str) -> str:
    """The embedding scheme with a linear scheme's bits and groups, so that a tied table is held once."""
    s = scheme(scheme_name)
    return f"w{s.bits}-{next(g for g, n in GROUP_SIZES.items() if n == s.group_size)}"
