"""The decoder as TFLite operators, with the checkpoint's integers placed as they are.

It computes what gori.model and gori.quantized compute, one sequence at a time. Signatures are those that LiteRT-LM's
executor looks for: `prefill_T` writes T tokens' keys and values into the cache, `decode` writes one token's and gives
logits. Knows nothing of files beyond export/litert_file.py, and nothing is quantized here.

Shapes in names: T tokens of a call, C cache length, D model width, H query heads, K key/value heads, G = H / K,
V vocabulary, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from gori.export.litert_file import File, Signature, Subgraph
from gori.export.litert_weights import Kernels, dequantized_values, place_linear, place_table, reshape
from gori.export.weights import Weights, array
from gori.model import rope_frequencies

NO_ACTIVATION = schema.ActivationFunctionType.NONE


SMALL_CALL = 16
"""Tokens of a second prefill signature: a call is as long as its signature, whatever it holds, and most turns are
short. Larger chunks alone have it, and not where integers are dequantized: each signature keeps floats of its own."""


def build(w: Weights, context: int, chunk: int, kernels: Kernels) -> File:
    """The model with its signatures `prefill_{chunk}`, perhaps `prefill_16`, and `decode`."""
    file, short = File(), chunk >= 2 * SMALL_CALL and not dequantized_values(w, kernels)
    for tokens in (chunk, *((SMALL_CALL,) if short else ()), 0):
        name = f"prefill_{tokens}" if tokens else "decode"
        decoder = Decoder(Subgraph(file, name), w, context, tokens or 1, kernels)
        file.signatures.append(decoder.signature(name, logits=not tokens))
    return file


@dataclass(frozen=True)
class Rope:
    """Cosines and signed sines, `[1, 1, T, d]`."""

    cos: int
    sin: int


class Decoder:
    """One subgraph for T tokens at a time."""

    def __init__(self, g: Subgraph, w: Weights, context: int, tokens: int, kernels: Kernels) -> None:
        self.g, self.w, self.cfg, self.context, self.tokens = g, w, w.cfg, context, tokens
        self.kernels = kernels

    def signature(self, name: str, logits: bool) -> Signature:
        """Lay down all operators. Inputs: `tokens [1, T]` and `input_pos [T]` int32, `mask [1, 1, T, C]` float32 (0
        where a token may look, else a large negative number) and the caches; outputs: the caches, and with `logits`
        float32 `[1, 1, V]`."""
        g, T, C, cfg = self.g, self.tokens, self.context, self.cfg
        inputs = {
            "tokens": g.tensor("tokens", (1, T), "int32"),
            "input_pos": g.tensor("input_pos", (T,), "int32"),
            "mask": g.tensor("mask", (1, 1, T, C)),
        }
        for part in "kv":
            for i in range(cfg.layers):
                key = f"kv_cache_{part}_{i}"
                inputs[key] = g.tensor(key, (1, cfg.kv_heads, C, cfg.head_dim))
        outputs: dict[str, int] = {}
        self.mask, self.at = inputs["mask"], self.start(inputs["input_pos"])
        self.rope_k, self.rope_q = self.ropes(inputs["input_pos"])
        x = self.embed(inputs["tokens"])
        for i in range(cfg.layers):
            caches = [inputs[f"kv_cache_{part}_{i}"] for part in "kv"]
            x, updated = self.layer(x, i, caches, last=not logits and i == cfg.layers - 1)
            outputs.update({f"kv_cache_{part}_{i}": u for part, u in zip("kv", updated, strict=True)})
        if logits:
            outputs["logits"] = self.linear(self.norm(x, "model.norm"), self.w.head_name)
        return Signature(name, g, inputs, outputs)

    def embed(self, tokens: int) -> int:
        """`[1, T, D]`."""
        ids = self.reshape(tokens, (self.tokens,), "int32")
        rows = place_table(self.g, self.w, ids, self.kernels)
        return self.reshape(rows, (1, self.tokens, self.cfg.hidden_size))

    def start(self, positions: int) -> int:
        """Where the call's rows go in a cache: int32 `[0, 0, first position, 0]`."""
        g, zero = self.g, self.g.constant("zero", np.zeros(1, np.int32))
        first = positions
        if self.tokens > 1:
            one = g.constant("one", np.ones(1, np.int32))
            first = g.op("SLICE", [positions, zero, one], (1,), dtype="int32", options=schema.SliceOptionsT())
        return self.concat([zero, zero, first, zero], (4,), 0, "int32")

    def ropes(self, positions: int) -> tuple[Rope, Rope]:
        """Rotations of keys and of queries, computed at run time: as tables they would be a small model's largest
        constants. The queries' are scaled by d^-1/2, which saves scaling the scores of every layer."""
        g, T, d = self.g, self.tokens, self.cfg.head_dim
        options = schema.CastOptionsT(schema.TensorType.INT32, schema.TensorType.FLOAT32)
        column = self.reshape(g.op("CAST", [positions], (T,), options=options), (1, 1, T, 1))
        frequencies = array(rope_frequencies(self.cfg)).reshape(1, 1, 1, d // 2)
        angles = self.mul(column, g.constant("rope_frequencies", frequencies), (1, 1, T, d // 2))
        cos = g.op("COS", [angles], (1, 1, T, d // 2), options=schema.CosOptionsT())
        sin = g.op("SIN", [angles], (1, 1, T, d // 2))
        minus = self.scalar("minus_one", -1.0)
        shape = (1, 1, T, d)
        cos = self.concat([cos, cos], shape, 3)
        sin = self.concat([self.mul(sin, minus, (1, 1, T, d // 2)), sin], shape, 3)
        scale = self.scalar("attention_scale", d**-0.5)
        return Rope(cos, sin), Rope(self.mul(cos, scale, shape), self.mul(sin, scale, shape))

    def layer(self, x: int, index: int, caches: list[int], last: bool) -> tuple[int, list[int]]:
        """One block: `[1, T, D]` and the updated caches. In the last of a prefill nothing follows the caches."""
        stem, shape = f"model.layers.{index}", (1, self.tokens, self.cfg.hidden_size)
        h = self.norm(x, f"{stem}.input_layernorm")
        caches = [self.cache(h, f"{stem}.self_attn.{p}_proj", c) for p, c in zip("kv", caches, strict=True)]
        if last:
            return x, caches
        x = self.add(x, self.attend(h, stem, *caches), shape)
        h = self.norm(x, f"{stem}.post_attention_layernorm")
        gate, up = (self.linear(h, f"{stem}.mlp.{p}_proj.weight") for p in ("gate", "up"))
        wide = (1, self.tokens, self.cfg.intermediate_size)
        gated = self.mul(self.mul(gate, self.g.op("LOGISTIC", [gate], wide), wide), up, wide)
        return self.add(x, self.linear(gated, f"{stem}.mlp.down_proj.weight"), shape), caches

    def cache(self, h: int, name: str, cache: int) -> int:
        """The cache `[1, K, C, d]` with the call's keys or values written into it."""
        rows = self.heads(self.linear(h, f"{name}.weight"), self.cfg.kv_heads)
        if name.endswith("k_proj"):
            rows = self.turn(rows, name, self.cfg.kv_heads, self.rope_k)
        K, C, d, spare = self.cfg.kv_heads, self.context, self.cfg.head_dim, self.tokens - 1
        if not spare:
            return self.write_rows(cache, rows, (1, K, C, d))
        # a call writes as many rows as it is long; one that passes the cache's end would be shifted back by
        # DYNAMIC_UPDATE_SLICE, over rows that hold the prompt
        g, begin = self.g, self.g.constant("begin", np.zeros(4, np.int32))
        ends = g.constant(f"spare_rows_{spare}", np.array([[0, 0], [0, 0], [0, spare], [0, 0]], np.int32))
        longer = g.op("PAD", [cache, ends], (1, K, C + spare, d), options=schema.PadOptionsT())
        longer = self.write_rows(longer, rows, (1, K, C + spare, d))
        size = g.constant("cache_shape", np.array([1, K, C, d], np.int32))
        return g.op("SLICE", [longer, begin, size], (1, K, C, d), options=schema.SliceOptionsT())

    def write_rows(self, cache: int, rows: int, shape: tuple[int, ...]) -> int:
        options = schema.DynamicUpdateSliceOptionsT()
        return self.g.op("DYNAMIC_UPDATE_SLICE", [cache, rows, self.at], shape, options=options)

    def attend(self, h: int, stem: str, keys: int, values: int) -> int:
        """Grouped attention over the whole cache: the mask hides what is not yet written."""
        cfg, T, C = self.cfg, self.tokens, self.context
        H, K, d = cfg.heads, cfg.kv_heads, cfg.head_dim
        G = H // K
        name = f"{stem}.self_attn.q_proj"
        q = self.turn(self.heads(self.linear(h, f"{name}.weight"), H), name, H, self.rope_q)
        scores = self.matmul(self.reshape(q, (1, K, G * T, d)), keys, (1, K, G * T, C), transpose=True)
        scores = self.add(self.reshape(scores, (K, G, T, C)), self.mask, (K, G, T, C))
        shares = self.g.op("SOFTMAX", [scores], (K, G, T, C), options=schema.SoftmaxOptionsT(1.0))
        y = self.matmul(self.reshape(shares, (1, K, G * T, C)), values, (1, K, G * T, d))
        if T > 1:
            y = self.transpose(self.reshape(y, (1, H, T, d)), (1, T, H, d))
        return self.linear(self.reshape(y, (1, T, H * d)), f"{stem}.self_attn.o_proj.weight")

    def heads(self, x: int, n: int) -> int:
        """`[1, T, n * d]` → `[1, n, T, d]`."""
        T, d = self.tokens, self.cfg.head_dim
        if T == 1:
            return self.reshape(x, (1, n, 1, d))
        return self.transpose(self.reshape(x, (1, T, n, d)), (1, n, T, d))

    def turn(self, x: int, name: str, n: int, rope: Rope) -> int:
        """qk-norm where the kind has it, then gori.model.rotate of `[1, n, T, d]`."""
        g, shape = self.g, (1, n, self.tokens, self.cfg.head_dim)
        if self.cfg.qk_norm:
            x = self.norm(x, name.replace("_proj", "_norm"))
        half = (*shape[:3], shape[3] // 2)
        axis = g.constant("last_axis", np.array(3, np.int32))
        a, b = g.op_many("SPLIT", [axis, x], [half, half], options=schema.SplitOptionsT(2))
        swapped = self.concat([b, a], shape, 3)
        return self.add(self.mul(x, rope.cos, shape), self.mul(swapped, rope.sin, shape), shape)

    def norm(self, x: int, name: str) -> int:
        """Root mean square norm over the last dimension (gori.norm)."""
        g, shape = self.g, self.g.shapes[x]
        axis, one = g.constant(f"axis_{len(shape) - 1}", np.array([len(shape) - 1], np.int32)), (*shape[:-1], 1)
        mean = g.op("MEAN", [self.mul(x, x, shape), axis], one, options=schema.ReducerOptionsT(True))
        scale = g.op("RSQRT", [self.add(mean, self.scalar("norm_eps", self.cfg.norm_eps), one)], one)
        weight = g.constant(f"{name}.weight", array(self.w.floats[f"{name}.weight"]))
        return self.mul(self.mul(x, scale, shape), weight, shape)

    def linear(self, x: int, name: str) -> int:
        """`x @ weight.T + bias` as FULLY_CONNECTED."""
        return place_linear(self.g, self.w, name, x, self.kernels)

    def scalar(self, name: str, value: float) -> int:
        return self.g.constant(name, np.array([value], np.float32))

    def reshape(self, x: int, shape: tuple[int, ...], dtype: str = "float32") -> int:
        return reshape(self.g, x, shape, dtype)

    def transpose(self, x: int, shape: tuple[int, ...]) -> int:
        """Swap the middle dimensions of four."""
        order = self.g.constant("swap_middle", np.array([0, 2, 1, 3], np.int32))
        return self.g.op("TRANSPOSE", [x, order], shape, options=schema.TransposeOptionsT())

    def concat(self, parts: list[int], shape: tuple[int, ...], axis: int, dtype: str = "float32") -> int:
        options = schema.ConcatenationOptionsT(axis, NO_ACTIVATION)
        return self.g.op("CONCATENATION", parts, shape, dtype=dtype, options=options)

    def mul(self, a: int, b: int, shape: tuple[int, ...]) -> int:
        return self.g.op("MUL", [a, b], shape, options=schema.MulOptionsT(NO_ACTIVATION))

    def add(self, a: int, b: int, shape: tuple[int, ...]) -> int:
        return self.g.op("ADD", [a, b], shape, options=schema.AddOptionsT(NO_ACTIVATION))

    def matmul(self, a: int, b: int, shape: tuple[int, ...], transpose: bool = False) -> int:
        return self.g.op("BATCH_MATMUL", [a, b], shape, options=schema.BatchMatMulOptionsT(False, transpose))
