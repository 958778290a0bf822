"""The session over a .gguf by llama.cpp, as the wheel xllamacpp carries it: no torch, no compiler.

The wheel's own interface is llama.cpp's server, whose answers are JSON and hold log-probabilities in place of logits.
Its one library also exports llama.cpp's C interface (llama.h), and that is what is called here: token ids in, float32
logits out, float32 caches, attention without blocks.

llama.h passes settings in structures that grow from version to version. They are kept as bytes, and what they hold by
default is compared with what is known of them before a field is set: another layout is refused, not guessed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import re
import struct
import weakref
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from gori.errors import GoriError, MissingEngine
from gori.runtime.gguf_header import F32, Header, read_header
from gori.runtime.session import Logits, Session, SessionInfo

GGUF = "model.gguf"
DEFAULT_THREADS = 1
LONGEST_CONTEXT = 4096
"""Tokens that are allocated for a file that gori did not write; its own say how many."""
BATCH = 512
"""Tokens that are computed at once, at most, for a file that gori did not write: llama.cpp's default."""
CONTEXT, CHUNK, BOS, EOS = "gori.context", "gori.chunk", "gori.bos_token_id", "gori.eos_token_ids"
"""Metadata that gori writes."""
ERROR = 4
"""ggml's level of a log line."""
ROOM_BYTES = 1024
"""For a structure of llama.h that is passed by value; the largest has 160. Who calls and who is called agree on where
it begins, so room behind it does no harm."""
CONTEXT_DEFAULTS = struct.pack(
    "<10i4i2i4fif6i",
    *(512, 2048, 512, 1, 0, 0, 1, 4, 4, 0),  # tokens, batches, sequences, outputs, threads, kind of context
    *(-1, -1, -1, -1),  # RoPE scaling, pooling, attention, flash attention: by the model
    *(0, 0, -1.0, -1.0, -1.0, -1.0, 0, -1.0),  # RoPE's and YaRN's numbers
    *(0, 0, 0, 0, 1, 1),  # a callback and its argument; float16 caches
)
N_CTX, N_BATCH, N_UBATCH, FLASH_ATTENTION, TYPE_K, TYPE_V = 0, 4, 8, 52, 104, 108
"""Where the fields stand that are set."""
MODEL_DEFAULTS = struct.pack("<qqii", 0, 0, -1, 1)  # devices, overrides, layers on a GPU, how layers are split
N_GPU_LAYERS = 16


class _Struct(ctypes.Structure):
    """llama_model_params, llama_context_params or llama_batch, as bytes."""

    _fields_ = [("room", ctypes.c_uint8 * ROOM_BYTES)]

    def set(self, at: int, value: int) -> None:
        struct.pack_into("<i", self.room, at, value)


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (c_void_p, c_void_p)),
    "llama_model_default_params": (_Struct, ()),
    "llama_context_default_params": (_Struct, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, _Struct)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_init_from_model": (c_void_p, (c_void_p, _Struct)),
    "llama_free": (None, (c_void_p,)),
    "llama_n_ctx": (c_uint32, (c_void_p,)),
    "llama_n_batch": (c_uint32, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_batch_get_one": (_Struct, (c_void_p, c_int32)),
    "llama_decode": (c_int32, (c_void_p, _Struct)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
}
"""Function → what it returns and takes."""
_LogLine = CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
_errors: list[str] = []
"""What llama.cpp called an error since `open_gguf` began."""


@_LogLine
def _keep_errors(level: int, text: bytes | None, _: int | None) -> None:
    if level == ERROR and text:
        _errors.append(text.decode("utf-8", errors="replace").strip())


@functools.cache
def load_engine() -> Any:
    """llama.cpp's C functions; MissingEngine where the wheel is missing or is not laid out as this file knows it."""
    try:
        module = importlib.import_module("xllamacpp.xllamacpp")
    except ImportError as e:
        raise MissingEngine("running a .gguf needs llama.cpp: pip install 'gori[gguf]'") from e
    assert module.__file__ is not None
    library = ctypes.CDLL(module.__file__)
    missing = [name for name in _SIGNATURES if not hasattr(library, name)]
    for name, (result, arguments) in _SIGNATURES.items() if not missing else ():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if missing or not (
        bytes(library.llama_context_default_params().room).startswith(CONTEXT_DEFAULTS)
        and bytes(library.llama_model_default_params().room).startswith(MODEL_DEFAULTS)
    ):
        raise MissingEngine(
            f"xllamacpp {importlib.metadata.version('xllamacpp')} holds another llama.cpp than gori knows: install the "
            "version that pip install 'gori[gguf]' names"
        )
    library.llama_log_set(ctypes.cast(_keep_errors, c_void_p), None)
    library.llama_backend_init()
    return library


def check() -> None:
    """MissingEngine unless the llama.cpp that this file knows is here."""
    load_engine()


KV_TYPES = {"float32": 0, "q8_0": 8}
"""ggml's numbers of the types that keys and values are kept in."""


class GgufSession(Session):
    """One loaded model and its cache; see Session."""

    def __init__(self, library: Any, model: int, context: int, info: SessionInfo) -> None:
        super().__init__()
        self.info = info
        self._library, self._context = library, context
        self._free = weakref.finalize(self, _free, library, model, context)

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        if not self._free.alive:
            raise GoriError(f"the session of {self.info.path} is closed: open the file again")
        lib = self._library
        tokens = (c_int32 * len(ids))(*ids)
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context), 0, start, -1)
        if (code := lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(ids)))) != 0:
            raise GoriError(
                f"llama.cpp failed with {code} on {len(ids)} tokens at position {start} of {self.info.path}: reset the "
                "session, or export the file again"
            )
        logits = lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.info.vocab_size,)).copy()

    def close(self) -> None:
        """Free the model and its cache now; without it they go with the session."""
        self._free()


def _free(library: Any, model: int, context: int) -> None:
    library.llama_free(context)
    library.llama_model_free(model)


def open_directory(directory: Path, threads: int | None) -> GgufSession:
    """The model.gguf of an exported directory."""
    return open_gguf(directory / GGUF, threads)


def open_gguf(file: Path, threads: int | None, kv: str = "float32") -> GgufSession:
    """Load a .gguf, gori's or another's. `kv` is what keys and values are kept in: float32, or q8_0, a quarter of it.

    Raises GoriError for a file that is damaged as far as its head shows it, and for one that llama.cpp does not load.
    """
    header = read_header(file)
    check_consistent(header, file)
    info = describe(header, file, threads or DEFAULT_THREADS)
    lib = load_engine()
    _errors.clear()
    settings = lib.llama_model_default_params()
    settings.set(N_GPU_LAYERS, 0)
    model = lib.llama_model_load_from_file(str(file).encode(), settings)
    if not model:
        raise GoriError(f"{file} is not a GGUF that this llama.cpp loads ({_said()}): export it again")
    tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    context = lib.llama_init_from_model(model, context_settings(lib, info, kv)) if tokens == info.vocab_size else None
    if not context:
        lib.llama_model_free(model)
        why = _said() if tokens == info.vocab_size else f"it names {tokens} tokens, its table has {info.vocab_size}"
        raise GoriError(f"{file} cannot be run by llama.cpp ({why}): export it again")
    assert lib.llama_n_ctx(context) >= info.context
    assert lib.llama_n_batch(context) >= info.chunk
    lib.llama_set_n_threads(context, info.threads, info.threads)
    return GgufSession(lib, model, context, info)


def context_settings(library: Any, info: SessionInfo, kv: str) -> _Struct:
    """Float32 keys and values and attention computed whole, as the eager model has it; or q8_0, which llama.cpp keeps
    for flash attention alone."""
    p = library.llama_context_default_params()
    for at, value in ((N_CTX, info.context), (N_BATCH, info.chunk), (N_UBATCH, info.chunk)):
        p.set(at, value)
    p.set(FLASH_ATTENTION, int(kv != "float32"))
    for at in (TYPE_K, TYPE_V):
        p.set(at, KV_TYPES[kv])
    return p


def _said() -> str:
    """The first error of llama.cpp's log, without the functions that it came through; later ones only say that it
    failed."""
    return re.sub(r"^(\w+: (error loading model: )?)+", "", _errors[0]) if _errors else "it gave no reason"


def check_consistent(header: Header, file: Path) -> None:
    """Refuse a head that contradicts itself where llama.cpp would end the process in place of giving an error."""
    kind, tokens = header.architecture(), header.metadata.get("tokenizer.ggml.tokens", [])
    wrong = "two tokens of one name" if len(set(map(str, tokens))) != len(tokens) else ""
    if kind in ("llama", "qwen2", "qwen3"):
        wrong = wrong or contradiction(header, kind)
    if wrong:
        raise GoriError(f"{file} is damaged, it has {wrong}: export it again")


def contradiction(header: Header, kind: str) -> str:
    """What cannot be true of a network's sizes; empty if all can."""
    layers, heads = header.integer(f"{kind}.block_count"), header.integer(f"{kind}.attention.head_count")
    groups, width = header.integer(f"{kind}.attention.head_count_kv"), header.integer(f"{kind}.embedding_length")
    if not 1 <= layers <= len(header.tensors):
        return f"{layers} layers and {len(header.tensors)} tensors"
    if not 1 <= groups <= heads or heads % groups:
        return f"{groups} key/value heads for {heads} query heads"
    wide = header.integer(f"{kind}.attention.key_length", width // heads)
    turned = header.integer(f"{kind}.rope.dimension_count", wide)
    if not 1 <= turned <= wide or turned % 2:
        return f"{turned} turned dimensions in heads of {wide}"
    epsilon = header.metadata.get(f"{kind}.attention.layer_norm_rms_epsilon", 0.0)
    if not isinstance(epsilon, float) or not epsilon >= 0:  # NaN, too
        return f"a norm's epsilon of {epsilon}"
    odd = next((t for t in header.tensors.values() if len(t.shape) == 1 and t.kind != F32), None)
    return f"a vector {odd.name} of ggml's type {odd.kind}" if odd else ""


def describe(header: Header, file: Path, threads: int) -> SessionInfo:
    """What a file says of itself; GoriError if it says too little to be run."""
    meta, own = header.metadata, CONTEXT in header.metadata
    trained = header.integer(f"{header.architecture()}.context_length")
    context = header.integer(CONTEXT) if own else min(trained, LONGEST_CONTEXT)
    chunk = header.integer(CHUNK) if own else min(BATCH, context)
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise GoriError(f"{file} has no matrix token_embd.weight, so it is no decoder: export it again")
    if not 1 <= chunk <= context <= trained:
        raise GoriError(
            f"{file} asks for a context of {context}, {chunk} at once; the model was trained with {trained}: export it "
            "again"
        )
    bos, eos = (BOS, EOS) if own else ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    ends = header.integers(eos) if own and eos in meta else [header.integer(eos)] if eos in meta else []
    return SessionInfo(
        engine="llama.cpp",
        engine_version=importlib.metadata.version("xllamacpp"),
        path=str(file),
        vocab_size=table.shape[0],
        context=context,
        chunk=chunk,
        bos_id=header.integer(bos) if bos in meta else None,
        eos_ids=tuple(ends),
        threads=threads,
        file_bytes=header.file_bytes,
    )
