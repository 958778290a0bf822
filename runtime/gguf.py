"""The session over a .gguf by llama.cpp, as the wheel xllamacpp carries it: no torch, no compiler.

The wheel holds llama.cpp's server, so a request is JSON and so is the answer: token ids in, the log-probability of
every token out, computed from the raw logits. The keys and values of a prefix stay in the server's one slot; a request
names the whole history, and what the slot holds of it is not computed again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gori.errors import GoriError
from gori.runtime.gguf_header import Header, first, read_header
from gori.runtime.session import Logits, Session, SessionInfo

GGUF = "model.gguf"
DEFAULT_THREADS = 1
LONGEST_CONTEXT = 4096
"""Tokens that are allocated for a file that gori did not write; its own say how many."""
BATCH = 512
"""Tokens that llama.cpp computes at once, at most; its own default."""
QUIET = 0
"""llama.cpp's verbosity: its own output alone. 1 adds errors, 2 warnings."""
CONTEXT, BOS, EOS = "gori.context", "gori.bos_token_id", "gori.eos_token_ids"
"""Metadata that gori writes."""
LEAST_LOG_P = -104.0
"""About the logarithm of float32's smallest number. llama.cpp computes a probability in float32 and writes its
logarithm; where that is 0 it writes the lowest float."""
_ID, _LOG_P = re.compile(rb'"id":(\d+)'), re.compile(rb'"logprob":(-?[0-9.e+-]+)')


def load_engine() -> Any:
    """The module xllamacpp; GoriError if the wheel is missing."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as e:
        raise GoriError("running a .gguf needs llama.cpp: pip install 'gori[gguf]'") from e


class GgufSession(Session):
    """One loaded model with one slot; see Session. `info.log_probabilities` is true."""

    def __init__(self, server: Any, info: SessionInfo) -> None:
        super().__init__()
        self.info = info
        self._server = server

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        # the history that ends at `start` is what the slot's cache begins with: its ids are compared, not recomputed
        return self._log_probabilities([*self._written[:start], *ids])

    def _log_probabilities(self, prompt: list[int]) -> Logits:
        answer = self._ask({"prompt": prompt, "n_probs": self.info.vocab_size})
        tokens = np.array(_ID.findall(answer)[1:], dtype=np.int64)  # the first is the sampled token, said twice
        log_p = np.array(_LOG_P.findall(answer)[1:], dtype=np.float64)
        if len(tokens) != self.info.vocab_size or len(log_p) != len(tokens):
            raise GoriError(
                f"llama.cpp {self.info.engine_version} gave {len(tokens)} of {self.info.vocab_size} log-probabilities: "
                "install the version that constraints.txt names"
            )
        found = np.empty(self.info.vocab_size)
        found[tokens] = np.maximum(log_p, LEAST_LOG_P)
        # its float32 sum over the vocabulary is off by some 1e-6, the same for every token
        return (found - np.log(np.exp(found).sum())).astype(np.float32)

    def _ask(self, request: dict[str, Any]) -> bytes:
        """The answer to a completion of one token; nothing is sampled from a distribution that was cut or bent."""
        fixed = {"n_predict": 1, "temperature": 0, "cache_prompt": True, "post_sampling_probs": False}
        answers: list[bytes] = []
        self._server.handle_completions(json.dumps(request | fixed).encode(), answers.append)
        if len(answers) != 1 or answers[0].startswith(b'{"error"'):
            said = answers[0].decode("utf-8", errors="replace")[:300] if answers else "nothing"
            raise GoriError(f"llama.cpp refused {len(request['prompt'])} tokens of {self.info.path}: it said {said}")
        return answers[0]

    def close(self) -> None:
        """End the engine's threads and free the model; the session cannot be used afterwards."""
        self._server = None


def open_gguf(file: Path, threads: int | None) -> GgufSession:
    """Load a .gguf, gori's or another's."""
    header = read_header(file)
    engine = load_engine()
    context = context_of(header)
    count = threads or DEFAULT_THREADS
    try:
        server = engine.Server(parameters(engine, file, context, count))
    except RuntimeError as e:
        raise GoriError(f"{file} is not a GGUF that this llama.cpp loads ({e}): export it again") from e
    return GgufSession(server, info_of(header, file, context, count))


def open_directory(directory: Path, threads: int | None) -> GgufSession:
    """The model.gguf of an exported directory."""
    return open_gguf(directory / GGUF, threads)


def parameters(engine: Any, file: Path, context: int, threads: int) -> Any:
    """What llama.cpp's server is started with: float32 caches, plain attention, one slot, all layers on the CPU."""
    p = engine.CommonParams()
    p.model.path = str(file)
    p.n_ctx = context + 1  # the server wants room for the token that it samples
    p.n_batch = p.n_ubatch = min(BATCH, context + 1)
    p.n_parallel, p.n_gpu_layers = 1, 0
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.cache_type_k = p.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.fit_params = p.warmup = p.ctx_shift = p.ui = p.endpoint_slots = False
    p.cache_ram_mib = p.n_ctx_checkpoints = 0
    p.cache_idle_slots = False
    p.verbosity = QUIET
    # the server also listens on a port of this machine: nobody has its key
    p.n_threads_http, p.api_keys = 1, [secrets.token_hex(32)]
    return p


def vocabulary(header: Header) -> int:
    """Rows of the table."""
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise GoriError("the GGUF has no matrix token_embd.weight, so it is no decoder: export it again")
    return table.shape[0]


def context_of(header: Header) -> int:
    """Tokens that the KV cache is to hold."""
    own = first(header.metadata, CONTEXT)
    trained = header.integer(f"{header.architecture()}.context_length")
    context = min(trained - 1, LONGEST_CONTEXT) if own is None else own
    if not 1 <= context < trained:
        raise GoriError(f"the GGUF asks for a context of {context}, allowed is 1..{trained - 1}: export it again")
    return context


def info_of(header: Header, file: Path, context: int, threads: int) -> SessionInfo:
    meta = header.metadata
    eos = header.integers(EOS) if EOS in meta else [meta[k] for k in ("tokenizer.ggml.eos_token_id",) if k in meta]
    return SessionInfo(
        engine="llama.cpp",
        engine_version=importlib.metadata.version("xllamacpp"),
        path=str(file),
        vocab_size=vocabulary(header),
        context=context,
        chunk=context,
        bos_id=first(meta, BOS) if EOS in meta else first(meta, "tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(eos),
        threads=threads,
        file_bytes=header.file_bytes,
        log_probabilities=True,
    )
