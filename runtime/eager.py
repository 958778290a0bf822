"""The session over a checkpoint folder, float or quantized, computed by gori's own decoder in torch on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gori import quantized
from gori.artifact import read_json
from gori.checkpoint import WEIGHTS
from gori.model import Decoder, KVCache
from gori.runtime.session import Logits, Session, SessionInfo

LONGEST_CONTEXT = 4096
"""Tokens that are allocated at most; a checkpoint's max_position may be larger than this machine's memory."""


class EagerSession(Session):
    """One decoder and its cache; see Session."""

    def __init__(self, model: Decoder, info: SessionInfo) -> None:
        super().__init__()
        self.info = info
        self._model = model
        self._cache = KVCache(model.cfg, batch=1, max_len=info.context)

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        self._cache.length = start
        with torch.inference_mode():
            hidden = self._model.hidden(torch.tensor([list(ids)]), self._cache)
            return self._model.logits(hidden[0, -1]).numpy()


def open_checkpoint(file: Path, threads: int | None) -> EagerSession:
    """Load the folder of a config.json. `threads` sets torch's count, which is the process's."""
    directory = file.parent
    if threads is not None:
        torch.set_num_threads(threads)
    return session_of(quantized.load(directory), directory)


def session_of(model: Decoder, directory: Path, context: int | None = None) -> EagerSession:
    """A session over a loaded decoder, whose folder says what ends a turn."""
    context = context or min(model.cfg.max_position, LONGEST_CONTEXT)
    bos_id, eos_ids = special_ids(directory)
    info = SessionInfo(
        engine="eager",
        engine_version=torch.__version__,
        path=str(directory),
        vocab_size=model.cfg.vocab_size,
        context=context,
        chunk=context,
        bos_id=bos_id,
        eos_ids=eos_ids,
        threads=torch.get_num_threads(),
        file_bytes=sum(p.stat().st_size for p in directory.glob(f"{WEIGHTS.split('.')[0]}*.safetensors")),
    )
    return EagerSession(model, info)


def special_ids(directory: Path) -> tuple[int | None, tuple[int, ...]]:
    """The first and the ending token ids that generation_config.json names, or else config.json."""
    body: dict[str, Any] = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        body = {**body, **read_json(generation)}
    eos = body.get("eos_token_id")
    return body.get("bos_token_id"), tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
