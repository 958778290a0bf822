"""What an ATOM-Max export asks of the compiler, by optimum-rbln 0.12.0's rules, and whether it fits the card.

Numbers and rules alone: no torch, no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gori.errors import GoriError

NPU = "RBLN-CA25"
"""ATOM-Max in Rebellions' naming."""
DEVICES = (1, 2, 4)
"""A card is four devices; a model is spread over one, two or all."""
CHUNK_STEP = 64
LONGEST_EAGER = 32768
PARTITIONS = (1024, 32768)
"""Shortest and longest `kvcache_partition_len` of flash attention on ATOM."""
PARTITION = 16384
DEVICE_BYTES = 16 * 2**30 - 288 * 2**20
"""Memory of a device less what the system keeps (optimum-rbln's own figure)."""
ALIGNMENT_BYTES = 2 * 2**20
"""Of every KV tensor."""
DEVICE_BYTES_PER_S = 256e9
OPTIONS = ("batch", "devices")
"""What `--backend` sets: `batch=8+1,devices=2`."""


@dataclass(frozen=True)
class Plan:
    """Lengths and sizes of the static graphs."""

    context: int
    chunk: int
    batches: tuple[int, ...]
    """Sizes of the decode graphs, the largest first."""
    devices: int | None
    """None: the fewest whose memory suffices."""

    @property
    def attention(self) -> str:
        return "eager" if self.context <= LONGEST_EAGER else "flash_attn"

    @property
    def block_size(self) -> int:
        """Positions of a cache block: the whole context, or a partition of flash attention."""
        return self.context if self.attention == "eager" else PARTITION

    @property
    def batch(self) -> int:
        return self.batches[0]

    def rbln_config(self, weights: str | None, devices: int) -> dict[str, Any]:
        """The arguments of optimum-rbln. `weights` is int4, int8, or None for a float checkpoint."""
        config: dict[str, Any] = {
            "batch_size": self.batch,
            "max_seq_len": self.context,
            "prefill_chunk_size": self.chunk,
            "decoder_batch_sizes": list(self.batches),
            "attn_impl": self.attention,
            "npu": NPU,
            "num_devices": devices,
            "create_runtimes": False,
        }
        if self.attention == "flash_attn":
            config["kvcache_partition_len"] = PARTITION
        if weights:
            config["quantization"] = {"format": "rbln", "weights": weights, "activations": "fp16"}
        return config


def make_plan(context: int, chunk: int, settings: str | None) -> Plan:
    """A plan of lengths and the text of `--backend`; GoriError for what the compiler's front end would refuse."""
    batches, devices = _read_settings(settings)
    if chunk % CHUNK_STEP:
        near = max(CHUNK_STEP, chunk // CHUNK_STEP * CHUNK_STEP)
        raise GoriError(
            f"chunk {chunk} is not a multiple of {CHUNK_STEP}, which ATOM-Max's prefill needs: "
            f"choose --chunk {near} and a --context of at least {2 * near}"
        )
    if context % chunk:
        raise GoriError(
            f"context {context} is not a multiple of chunk {chunk}, so the last padded chunk would pass the end of the "
            f"cache: choose --context {max(2, context // chunk) * chunk}, or another --chunk (a multiple of 64)"
        )
    plan = Plan(context, chunk, batches, devices)
    if plan.attention == "flash_attn" and context % PARTITION:
        raise GoriError(
            f"context {context} is over {LONGEST_EAGER}, where ATOM-Max keeps the cache in partitions of {PARTITION}: "
            f"choose --context {context // PARTITION * PARTITION}"
        )
    return plan


def _read_settings(text: str | None) -> tuple[tuple[int, ...], int | None]:
    given = {}
    for part in (text or "").split(",") if text else ():
        name, _, value = part.partition("=")
        if name not in OPTIONS or name in given:
            raise GoriError(f"{part!r} sets nothing on target atom-max: give batch=8+1,devices=2 or one of the two")
        given[name] = value
    try:
        sizes = sorted({int(n) for n in given.get("batch", "1").split("+")}, reverse=True)
        devices = int(given["devices"]) if "devices" in given else None
    except ValueError as e:
        raise GoriError(f"{text!r} names a batch or devices that is no number: give batch=8+1,devices=2") from e
    if sizes[-1] < 1 or sizes[0] > 256:
        raise GoriError(f"a batch of {sizes[0] if sizes[0] > 256 else sizes[-1]} is not in 1..256")
    if devices is not None and devices not in DEVICES:
        raise GoriError(f"{devices} devices are not a part of an ATOM-Max card: choose one of {DEVICES}")
    return tuple(sizes), devices


@dataclass(frozen=True)
class Load:
    """What a model asks of the card, in bytes and counts."""

    split_bytes: int
    """Linears and the head: divided among devices."""
    whole_bytes: int
    """The table, norms and biases: on every device."""
    layers: int
    kv_heads: int
    head_dim: int

    def kv_bytes(self, plan: Plan, devices: int, value_bytes: int = 2) -> int:
        """Of one device: 2 tensors a layer, its share of the heads, each aligned."""
        heads = -(-self.kv_heads // devices)
        one = plan.batch * plan.context * heads * self.head_dim * value_bytes
        return 2 * self.layers * (-(-one // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)

    def device_bytes(self, plan: Plan, devices: int) -> int:
        return -(-self.split_bytes // devices) + self.whole_bytes + self.kv_bytes(plan, devices)


def memory_table(load: Load, plan: Plan) -> dict[str, Any]:
    """Bytes of a device for each number of devices, and whether they fit."""
    rows = {
        str(n): {
            "weights_bytes": -(-load.split_bytes // n) + load.whole_bytes,
            "kv_bytes": load.kv_bytes(plan, n),
            "kv_bytes_if_float32": load.kv_bytes(plan, n, 4),
            "total_bytes": load.device_bytes(plan, n),
            "fits": load.device_bytes(plan, n) <= DEVICE_BYTES,
        }
        for n in DEVICES
    }
    return {"available_bytes_per_device": DEVICE_BYTES, "compiler_workspace_bytes": None, "devices": rows}


def choose_devices(load: Load, plan: Plan) -> int:
    """The devices that were asked for, or the fewest that hold the model; GoriError where they do not."""
    fitting = [n for n in DEVICES if load.device_bytes(plan, n) <= DEVICE_BYTES]
    chosen = plan.devices or (fitting[0] if fitting else DEVICES[-1])
    if chosen not in fitting:
        need = load.device_bytes(plan, chosen)
        more = f"devices={fitting[0]}, " if fitting else ""
        raise GoriError(
            f"{need / 2**30:.1f} GiB of weights and KV cache on each of {chosen} devices exceed the "
            f"{DEVICE_BYTES / 2**30:.1f} GiB that one has: choose {more}a shorter --context or a smaller batch"
        )
    return chosen


def roofline(load: Load, plan: Plan, devices: int) -> dict[str, Any]:
    """Milliseconds in which a device can read its weights once, and its filled cache besides: no decode step is faster.

    The look-up of a few rows of the table is not counted.
    """
    weights = -(-load.split_bytes // devices)
    cache = load.kv_bytes(plan, devices)
    return {
        "label": "bandwidth lower bound, not latency",
        "devices": devices,
        "empty_cache_ms": round(weights / DEVICE_BYTES_PER_S * 1e3, 4),
        "full_cache_ms": round((weights + cache) / DEVICE_BYTES_PER_S * 1e3, 4),
        "calibration": "Qwen3-4B in fp16 on 4 devices: this bound 7.86 ms, one published run 9.51 ms",
    }
