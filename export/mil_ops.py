"""MIL's operations in NumPy, those that gori's programs and its ExecuTorch Core ML delegates use: each rounds its
result once, to the type of its input.

Semantics are those of coremltools' documented operations (opset iOS 18). What a device keeps inside one operation, a
sum in float16 or the scores of its fused attention, cannot be known here: sums and scores are float32.

An operation takes its arguments by MIL's names, each a list as in the program, and gives one array or a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Inputs = dict[str, list[Any]]


def wide(x: Array) -> Array:
    return x.astype(np.float32, copy=False)


def half(x: Array) -> Array:
    return x.astype(np.float16)


def like(x: Array, y: Array) -> Array:
    """`y`, computed in float32, in the type of the operation's input."""
    return y.astype(x.dtype)


def numbers(i: Inputs, name: str) -> list[int]:
    """A vector of integers."""
    return [int(v) for v in np.atleast_1d(i[name][0])]


def number(i: Inputs, name: str) -> int:
    return int(np.asarray(i[name][0]).item())


def flags(i: Inputs, name: str, count: int) -> list[bool]:
    return [bool(v) for v in i[name][0]] if name in i else [False] * count


def binary(f: Callable[[Array, Array], Array]) -> Callable[[Inputs], Array]:
    """An element-wise operation of x and y. NumPy computes float16 in float32 and rounds."""
    return lambda i: np.asarray(f(i["x"][0], i["y"][0]))


def reduce_mean(i: Inputs) -> Array:
    x, axes = i["x"][0], tuple(numbers(i, "axes"))
    return like(x, wide(x).mean(axes, keepdims=bool(number(i, "keep_dims"))))


def slices(i: Inputs) -> tuple[slice, ...]:
    """The region of slice_by_index and slice_update. A dimension that is squeezed is one element, whatever its end."""
    begin, end = numbers(i, "begin"), numbers(i, "end")
    masks = (flags(i, f"{name}_mask", len(begin)) for name in ("begin", "end", "squeeze"))
    return tuple(
        slice(b, b + 1 or None) if one else slice(None if first else b, None if last else e)
        for b, e, first, last, one in zip(begin, end, *masks, strict=True)
    )


def slice_by_index(i: Inputs) -> Array:
    x = i["x"][0][slices(i)]
    gone = [axis for axis, squeezed in enumerate(flags(i, "squeeze_mask", x.ndim)) if squeezed]
    return np.squeeze(x, axis=tuple(gone))


def slice_update(i: Inputs) -> Array:
    x = i["x"][0].copy()
    region = slices(i)
    if x[region].shape != i["update"][0].shape:
        raise ValueError(f"slice_update of {list(i['update'][0].shape)} into {list(x[region].shape)}")
    x[region] = i["update"][0]
    return x


def linear(i: Inputs) -> Array:
    """`x [..., in]` times `weight [out, in]` (float32 of float16 values) plus bias; rounded once."""
    y = wide(i["x"][0]) @ i["weight"][0].T
    return half(y + wide(i["bias"][0]) if "bias" in i else y)


def attention(i: Inputs) -> Array:
    """scaled_dot_product_attention with a mask that is added, or true where a position is seen; rounded once."""
    q, k, v = (wide(i[name][0]) for name in ("query", "key", "value"))
    mask = i["attn_mask"][0]
    scores = q @ k.swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.where(mask, scores, np.float32(-np.inf)) if mask.dtype == np.bool_ else scores + wide(mask)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return half(p / p.sum(-1, keepdims=True) @ v)


def silu(i: Inputs) -> Array:
    x = i["x"][0]
    return like(x, wide(x) / (1 + np.exp(-wide(x))))


def rsqrt(i: Inputs) -> Array:
    x = i["x"][0]
    return like(x, 1 / np.sqrt(wide(x) + wide(i["epsilon"][0])))


def cast(i: Inputs) -> Array:
    return i["x"][0].astype({"fp16": np.float16, "fp32": np.float32}.get(i["dtype"][0], i["dtype"][0]))


def gather(i: Inputs) -> Array:
    """Rows of float32 that stand for a table of float16 come out as float16."""
    found = np.take(i["x"][0], i["indices"][0], axis=number(i, "axis"))
    return half(found) if found.dtype == np.float32 else found


def inverse(i: Inputs) -> Array:
    x = i["x"][0]
    return like(x, 1 / (wide(x) + wide(i["epsilon"][0])))


def scatter_nd(i: Inputs) -> Array:
    if i["mode"][0] != "update":
        raise ValueError(f"scatter_nd with mode {i['mode'][0]}")
    x, at = i["data"][0].copy(), i["indices"][0]
    x[tuple(np.moveaxis(at, -1, 0))] = i["updates"][0]
    return x


def real_div(i: Inputs) -> Array:
    """Integers are divided as floats and cut."""
    x = i["x"][0]
    return like(x, np.divide(x, i["y"][0]))


def split(i: Inputs) -> list[Array]:
    if "num_splits" in i:
        return np.split(i["x"][0], number(i, "num_splits"), axis=number(i, "axis"))
    return np.split(i["x"][0], np.cumsum(numbers(i, "split_sizes"))[:-1], axis=number(i, "axis"))


def squeeze(i: Inputs) -> Array:
    return np.squeeze(i["x"][0], axis=tuple(numbers(i, "axes")))


def range_1d(i: Inputs) -> Array:
    return np.arange(number(i, "start"), number(i, "end"), number(i, "step"), dtype=np.int32)


OPERATIONS: dict[str, Callable[[Inputs], Any]] = {
    "abs": lambda i: np.abs(i["x"][0]),
    "add": binary(np.add),
    "cast": cast,
    "concat": lambda i: np.concatenate([np.atleast_1d(v) for v in i["values"]], axis=number(i, "axis")),
    "equal": binary(np.equal),
    "expand_dims": lambda i: np.expand_dims(i["x"][0], tuple(numbers(i, "axes"))),
    "gather": gather,
    "greater": binary(np.greater),
    "greater_equal": binary(np.greater_equal),
    "inverse": inverse,
    "less_equal": binary(np.less_equal),
    "linear": linear,
    "mul": binary(np.multiply),
    "range_1d": range_1d,
    "real_div": real_div,
    "reduce_max": lambda i: np.max(i["x"][0], tuple(numbers(i, "axes")), keepdims=bool(number(i, "keep_dims"))),
    "reduce_mean": reduce_mean,
    "reshape": lambda i: np.reshape(i["x"][0], numbers(i, "shape")),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": attention,
    "scatter_nd": scatter_nd,
    "select": lambda i: np.where(i["cond"][0], i["a"][0], i["b"][0]),
    "shape": lambda i: np.array(i["x"][0].shape, np.int32),
    "silu": silu,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "sub": binary(np.subtract),
    "tile": lambda i: np.tile(i["x"][0], numbers(i, "reps")),
    "transpose": lambda i: np.transpose(i["x"][0], numbers(i, "perm")),
}
"""MIL's name of an operation → what it does."""
