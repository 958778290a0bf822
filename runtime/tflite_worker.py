"""Runs in the environment of tflite-runtime, where gori cannot be imported: calls in by stdin, logits out by stdout.

`tflite_worker.py MODEL THREADS`. It answers `R` and the runtime's version, then for every call
`<BII` (length of the signature's name, T, C), the name, int32 tokens and positions `[T]` and the float32 mask `[T, C]`
answers `D` and the logits (nothing for a prefill), or `E` and what went wrong. Each answer has its length behind the
letter. The caches stay here. It ends when its input does.
"""

import struct
import sys
import traceback

import numpy as np
import tflite_runtime  # pyright: ignore[reportMissingImports]
from tflite_runtime.interpreter import Interpreter  # pyright: ignore[reportMissingImports]


def main(path: str, threads: int) -> None:
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not stand between answers
    try:
        interpreter = Interpreter(path, num_threads=threads)
        runners = {n: interpreter.get_signature_runner(n) for n in interpreter.get_signature_list()}
        shapes = {n: d["shape"] for n, d in runners["decode"].get_input_details().items() if n.startswith("kv_cache")}
        caches = {n: np.zeros(shape, np.float32) for n, shape in shapes.items()}
    except (ValueError, RuntimeError, KeyError) as e:
        say(answers, b"E", str(e).encode())
        return
    say(answers, b"R", tflite_runtime.__version__.encode())
    while head := sys.stdin.buffer.read(9):
        name_length, length, context = struct.unpack("<BII", head)
        name = sys.stdin.buffer.read(name_length).decode()
        inputs = {
            "tokens": read("<i4", (1, length)),
            "input_pos": read("<i4", (length,)),
            "mask": read("<f4", (1, 1, length, context)),
        }
        try:
            outputs = runners[name](**inputs, **caches)
        except (ValueError, RuntimeError, KeyError):
            say(answers, b"E", traceback.format_exc(limit=1).splitlines()[-1].encode())
            continue
        found = outputs.pop("logits", np.zeros(0))
        caches = outputs
        say(answers, b"D", found.astype("<f4").tobytes())


def read(dtype: str, shape: tuple) -> np.ndarray:
    count = int(np.prod(shape)) * 4
    return np.frombuffer(sys.stdin.buffer.read(count), dtype).reshape(shape)


def say(answers, kind: bytes, body: bytes) -> None:
    answers.write(struct.pack("<cI", kind, len(body)) + body)
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
