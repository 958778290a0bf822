"""The decoder as a MIL program: given integers as compile-time constants, caches as states; float16 but for
the norms.

It computes what gori.model and gori.quantized compute, one sequence at a time, for the last token only, and leaves
inputs of linears unrounded, since Core ML has no per-token integer inputs. It knows nothing of files. Importing it
imports coremltools, whose builder checks the type and shape of every operation.

Shapes in names: S new tokens of this call, C cache length, D model width, L layers, H query heads, K key/value heads,
G query heads that share a key head, d head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from coremltools import RangeDim, TensorType, target
from coremltools.converters.mil.mil import Builder, Function, Program, get_new_symbol, types
from numpy.typing import NDArray

from gori.export.coreml_read import KEYS, VALUES, variable
from gori.export.weights import Weights, array
from gori.model import rope_frequencies
from gori.quantized import EMBEDDING

mb: Any = Builder
"""Its operations are attributes that a registry adds."""
OPSET = target.iOS18
"""The first with states, int4 weights and scales per block."""
MASKED = np.float16(-3e4)
"""Added to the score of a position that may not be seen: its exponential is zero in float16, and a sum with any score
above -35504 stays finite."""


@dataclass(frozen=True)
class Call:
    """What every layer of one call uses."""

    position_1: Any
    end_1: Any
    cos_S1h: Any
    """`[S, 1, d/2]`."""
    sin_S1h: Any
    mask: Any
    """float16 `[G*S, C]`."""


class Graph:
    """Builds `main(input_ids [1, S] int32, position [1] int32) → logits [1, 1, V] float16`, caches `[L, K, C, d]`."""

    def __init__(self, w: Weights, context: int) -> None:
        self.w, self.context = w, context
        self.constants: dict[str, Any] = {}

    def program(self, chunk: int) -> Program:
        """The whole network with S in 1..chunk."""
        cfg, S = self.w.cfg, get_new_symbol()
        cache = (cfg.layers, cfg.kv_heads, self.context, cfg.head_dim)
        inputs = {
            "input_ids": mb.placeholder((1, S), dtype=types.int32),
            "position": mb.placeholder((1,), dtype=types.int32),
            KEYS: mb.state_tensor_placeholder(cache, dtype=types.fp16),
            VALUES: mb.state_tensor_placeholder(cache, dtype=types.fp16),
        }
        program = Program()
        with fresh_names(), Function(inputs, opset_version=OPSET) as main:
            self.states = main.inputs[KEYS], main.inputs[VALUES]
            main.set_outputs([self.decoder(main.inputs["input_ids"], main.inputs["position"])])
        length = RangeDim(lower_bound=1, upper_bound=chunk, default=1)
        main.input_types = [
            TensorType("input_ids", (1, length), np.int32),
            TensorType("position", (1,), np.int32),
        ]
        program.add_function("main", main)
        return program

    def decoder(self, ids: Any, position: Any) -> Any:
        call = self.prepare(ids, position)
        x = mb.gather(x=self.weight(EMBEDDING), indices=ids, axis=0, validate_indices=False)
        for i in range(self.w.cfg.layers):
            x = self.layer(x, i, call)
        last = mb.slice_by_index(x=x, begin=[0, -1, 0], end=[0, 0, 0], end_mask=[True, True, True])
        return self.linear(self.norm(last, "model.norm.weight"), self.w.head_name, "logits")

    def prepare(self, ids: Any, position: Any) -> Call:
        """Rows of the rotation's tables, and the mask: a position sees itself and what stands before it."""
        cfg = self.w.cfg
        length = mb.slice_by_index(x=mb.shape(x=ids), begin=[1], end=[2])
        end = mb.add(x=position, y=length)
        first, behind = mb.squeeze(x=position, axes=[0]), mb.squeeze(x=end, axes=[0])
        rows = mb.range_1d(start=first, end=behind, step=1)
        angles = torch.arange(self.context).float().unsqueeze(1) * rope_frequencies(cfg)
        cos, sin = (
            mb.expand_dims(x=mb.gather(x=half(array(t)), indices=rows, axis=0, validate_indices=False), axes=[1])
            for t in (angles.cos(), angles.sin())
        )
        columns = np.arange(self.context, dtype=np.int32)[None]
        hidden = mb.greater(x=columns, y=mb.expand_dims(x=rows, axes=[1]))
        mask = mb.mul(x=mb.cast(x=hidden, dtype="fp16"), y=MASKED)
        if cfg.heads != cfg.kv_heads:
            mask = mb.tile(x=mask, reps=[cfg.heads // cfg.kv_heads, 1])
        return Call(position, end, cos, sin, mask)

    def layer(self, x: Any, index: int, call: Call) -> Any:
        stem = f"model.layers.{index}."
        attended = self.attend(self.norm(x, f"{stem}input_layernorm.weight"), index, call)
        x = mb.add(x=x, y=self.linear(attended, f"{stem}self_attn.o_proj.weight"))
        h = self.norm(x, f"{stem}post_attention_layernorm.weight")
        gate = mb.silu(x=self.linear(h, f"{stem}mlp.gate_proj.weight"))
        wide = mb.mul(x=gate, y=self.linear(h, f"{stem}mlp.up_proj.weight"))
        return mb.add(x=x, y=self.linear(wide, f"{stem}mlp.down_proj.weight"))

    def attend(self, x: Any, index: int, call: Call) -> Any:
        """What the heads found, `[1, S, H*d]`. Query heads of one key head stand behind each other as more positions,
        so that keys and values are not repeated."""
        cfg, stem = self.w.cfg, f"model.layers.{index}.self_attn."
        K, G, d = cfg.kv_heads, cfg.heads // cfg.kv_heads, cfg.head_dim
        q, k, v = (
            mb.reshape(x=self.linear(x, f"{stem}{part}_proj.weight"), shape=[1, -1, heads, d])
            for part, heads in (("q", cfg.heads), ("k", K), ("v", K))
        )
        if cfg.qk_norm:
            q, k = self.norm(q, f"{stem}q_norm.weight"), self.norm(k, f"{stem}k_norm.weight")
        q, k = self.rotate(q, call), self.rotate(k, call)
        keys, values = self.remember((k, v), index, call)
        q = mb.transpose(x=mb.reshape(x=q, shape=[1, -1, K, G, d]), perm=[0, 2, 3, 1, 4])
        q = mb.reshape(x=q, shape=[1, K, -1, d])
        y = mb.scaled_dot_product_attention(query=q, key=keys, value=values, attn_mask=call.mask)
        y = mb.transpose(x=mb.reshape(x=y, shape=[1, K, G, -1, d]), perm=[0, 3, 1, 2, 4])
        return mb.reshape(x=y, shape=[1, -1, cfg.heads * d])

    def remember(self, new: tuple[Any, Any], index: int, call: Call) -> list[Any]:
        """Write keys and values `[1, S, K, d]` to the caches; all of this layer's, `[1, K, C, d]`."""
        cfg = self.w.cfg
        begin = mb.concat(values=[ints(index, 0), call.position_1, ints(0)], axis=0)
        end = mb.concat(values=[ints(index + 1, cfg.kv_heads), call.end_1, ints(cfg.head_dim)], axis=0)
        found = []
        for state, x in zip(self.states, new, strict=True):
            update = mb.transpose(x=x, perm=[0, 2, 1, 3])
            filled = mb.slice_update(x=mb.read_state(input=state), update=update, begin=begin, end=end)
            filled = mb.coreml_update_state(state=state, value=filled)
            corner = [index + 1, cfg.kv_heads, self.context, cfg.head_dim]
            found.append(mb.slice_by_index(x=filled, begin=[index, 0, 0, 0], end=corner))
        return found

    def rotate(self, x: Any, call: Call) -> Any:
        """gori.model.rotate on halves: `[1, S, heads, d]`."""
        a, b = mb.split(x=x, num_splits=2, axis=-1)
        first = mb.sub(x=mb.mul(x=a, y=call.cos_S1h), y=mb.mul(x=b, y=call.sin_S1h))
        second = mb.add(x=mb.mul(x=b, y=call.cos_S1h), y=mb.mul(x=a, y=call.sin_S1h))
        return mb.concat(values=[first, second], axis=-1)

    def norm(self, x: Any, name: str) -> Any:
        """gori.model.RMSNorm, in float32 as there: squares of float16 overflow at 256, and a scale of three roundings
        puts the logits half again above the noise floor (docs)."""
        y = mb.cast(x=x, dtype="fp32")
        mean = mb.reduce_mean(x=mb.mul(x=y, y=y), axes=[-1], keep_dims=True)
        scale = mb.rsqrt(x=mb.add(x=mean, y=np.float32(self.w.cfg.norm_eps)), epsilon=np.float32(0))
        normed = mb.cast(x=mb.mul(x=y, y=scale), dtype="fp16")
        return mb.mul(x=normed, y=half(array(self.w.floats[name])))

    def linear(self, x: Any, name: str, output: str = "") -> Any:
        bias = self.w.bias(name)
        extra = {} if bias is None else {"bias": half(array(bias))}
        return mb.linear(x=x, weight=self.weight(name), **extra, name=output or variable(name.removesuffix(".weight")))

    def weight(self, name: str) -> Any:
        """The constant of a weight's name, made once: a tied table serves look-up and head."""
        if name not in self.constants:
            self.constants[name] = self.constant(name)
        return self.constants[name]

    def constant(self, name: str) -> Any:
        if name not in self.w.integers:
            return mb.const(val=half(array(self.w.floats[name])), name=variable(name))
        t = self.w.integers[name]
        q = array(t.q)
        data = q.astype(types.np_int4_dtype) if t.scheme.bits == 4 else q
        return mb.constexpr_blockwise_shift_scale(data=data, scale=half(array(t.scale)), name=variable(name))


@contextmanager
def fresh_names() -> Iterator[None]:
    """Number operations from 0: the builder counts through a whole process, and a second export would differ."""
    counts, mb.name_count = mb.name_count, defaultdict(int)
    try:
        yield
    finally:
        mb.name_count = counts


def half(x: NDArray[Any]) -> NDArray[np.float16]:
    return x.astype(np.float16)


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
