"""Teachers that gori did not train: any causal LM that transformers loads, imported by reference.

An import copies no weights. Its folder says where they are, what they hash to and how they are loaded, keeps tokenizer
and chat template as they are, and remembers what the teacher said to a few texts, which is checked at every opening.
Knows nothing of rows, caches or students. Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gori import checkpoint, console
from gori.artifact import Manifest, content_hash, make, read_manifest, read_object, write_json
from gori.errors import GoriError, one_line
from gori.model import Decoder
from gori.teacher.foreign_bits import to_four_bits
from gori.teacher.foreign_recipe import TEACHER, is_imported, speaks_gori

PROBE = "probe.json"
KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "tools.json",
)  # fmt: skip
"""What is copied where the folder has it."""
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "내일 아침 일곱 시에 서울역까지 가는 길을 알려 줘.",
    '{"name": "set_temperature", "arguments": {"zone": "driver", "celsius": 22}}',
)
PROBE_IDS = 5
SHOWN = 3
"""Tensors that an error names."""
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bf16": 0.3}
"""Largest difference of a log-probability that another machine's rounding may make (nats)."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loading:
    """How an imported teacher is loaded."""

    dtype: str = "bf16"
    device_map: str = "cpu"
    """`cpu`, or what accelerate takes: auto, balanced, …"""
    bits: int = 16
    """16: as its dtype is; 4: linear layers and experts in groups of 32."""
    trust_remote_code: bool = False


class TeacherModel(Protocol):
    """What a teacher has to give."""

    vocab_size: int
    context: int
    """Tokens of its longest row."""
    device: torch.device

    def logits(self, ids_BT: Tensor, valid_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        """Next-token logits `[wanted, V]` at the positions where `wanted_BT` (bool), row by row. ids int64, padded at
        the right; `valid_BT` (bool) is false there."""
        ...


class OwnTeacher:
    """A checkpoint folder that gori's decoder reads."""

    def __init__(self, model: Decoder) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocab_size, self.context = model.cfg.vocab_size, model.cfg.max_position
        self.device = model.rope_freq.device

    def logits(self, ids_BT: Tensor, valid_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        return self.model.logits(self.model.hidden(ids_BT, valid_BT=valid_BT, wanted_BT=wanted_BT))


class ForeignTeacher:
    """A model of transformers with its tokenizer, in evaluation mode."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.context: int = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        self.device: torch.device = model.get_input_embeddings().weight.device

    def logits(self, ids_BT: Tensor, valid_BT: Tensor, wanted_BT: Tensor) -> Tensor:
        keep = wanted_BT.any(0).nonzero().flatten()  # the head is computed at these positions only
        out = self.model(input_ids=ids_BT, attention_mask=valid_BT.long(), use_cache=False, logits_to_keep=keep)
        return out.logits[wanted_BT[:, keep]]


def open_teacher(directory: Path, device: torch.device) -> TeacherModel:
    """A teacher of either kind; an imported one has to say what it said when it was imported."""
    if not is_imported(directory):
        return OwnTeacher(checkpoint.load(directory).to(device))
    return open_foreign(directory)


def open_foreign(directory: Path) -> ForeignTeacher:
    """Load an imported teacher and check it against its probe."""
    body, manifest = read_object(directory / TEACHER), read_manifest(directory)
    folder = Path(manifest["settings"]["folder"])
    _check_files(folder, body["files"], directory)
    teacher = load(folder, Loading(**body["loading"]))
    _check_probe(read_object(directory / PROBE), probe(teacher), body["loading"]["dtype"], directory)
    return teacher


def check_length(teacher: TeacherModel, tokens: int, text: str) -> None:
    """Refuse a row that the teacher cannot read."""
    if tokens > teacher.context:
        raise GoriError(
            f"a row needs {tokens} of the teacher's tokens, its context is {teacher.context}: shorten the tools' "
            f"descriptions, or the row that begins {text[:40]!r}"
        )


def import_teacher(folder: Path, loading: Loading, out: Path) -> bool:
    """Write `out`: where the teacher is, its hash, its size, its tokenizer and its probe; returns whether it ran."""
    folder = folder.resolve()
    if not (folder / "config.json").exists():
        raise GoriError(f"{folder} has no config.json: name a folder that transformers' from_pretrained reads")
    weights = content_hash(folder)
    manifest = Manifest("import", folder.name, 0, {"folder": str(folder), **asdict(loading)}, {"folder": weights})

    def build(tmp: Path) -> None:
        teacher = load(folder, loading)
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        write_json(tmp / TEACHER, {"weights": weights, "loading": asdict(loading), "files": files})
        write_json(tmp / PROBE, probe(teacher))
        for name in KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, tmp / name)
        template = _template(teacher.tokenizer)
        (tmp / "chat_template.jinja").write_text(template, encoding="utf-8")
        if "tools" not in template and not speaks_gori(folder):
            lacks = "a chat template that shows tools" if template else "a chat template"
            console.log(
                f"{folder} lacks {lacks}: rows with tools cannot be asked in the teacher's own format "
                "(put its chat_template.jinja there and import it again)"
            )
        manifest.metrics |= {
            "architecture": type(teacher.model).__name__,
            "vocab_size": teacher.vocab_size,
            "chat_template": bool(template),
            **parameters(teacher.model),
        }

    return make(out, manifest, build)


def load(folder: Path, loading: Loading) -> ForeignTeacher:
    """Read a folder with transformers: weights come shard by shard onto their device."""
    for name in ("torchao", "torch.utils._pytree"):  # they tell of GPU kernels, and of each other's classes
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as speech

    if not sys.stderr.isatty():
        speech.disable_progress_bar()
    if loading.bits not in (4, 16):
        raise GoriError(f"--bits {loading.bits}: 4 packs linear layers and experts, 16 leaves them as they are")
    more: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code, "local_files_only": True}
    if loading.device_map != "cpu":
        _need_accelerate(loading.device_map)
    mapped: dict[str, Any] = {"device_map": loading.device_map} if loading.device_map != "cpu" else {}
    if loading.bits == 4:
        mapped["experts_implementation"] = "eager"  # one expert's matrix at a time
    said = speech.get_verbosity()
    speech.set_verbosity_error()  # its table of tensors: _check_whole tells it in a sentence
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **more)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[loading.dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it raises without a name
            **mapped,
            **more,
        )
    except Exception as e:  # a folder that is not whole raises nearly anything
        raise GoriError(f"transformers cannot load {folder}: {one_line(e)}") from e
    finally:
        speech.set_verbosity(said)
    model, told = loaded
    _check_whole(told, folder)
    teacher = ForeignTeacher(model, tokenizer)
    _check_tokenizer(teacher, folder)
    if loading.bits == 4:
        to_four_bits(model)
    return teacher


def _check_whole(told: dict[str, Any], folder: Path) -> None:
    """Refuse a model some of whose tensors transformers filled at random."""
    if missing := sorted(told["missing_keys"]):
        raise GoriError(f"{folder} lacks {_first(missing)}, which would be random: copy the whole folder again")
    if other := sorted(told["mismatched_keys"]):
        shown = [f"{name} ({tuple(has)}, config.json asks for {tuple(wanted)})" for name, has, wanted in other]
        raise GoriError(
            f"{folder} has tensors of other shapes, {_first(shown)}: restore the config.json of its weights"
        )
    if unread := sorted(told["unexpected_keys"]):
        console.log(f"{folder}: its architecture does not read {_first(unread)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else "")


def _check_tokenizer(teacher: ForeignTeacher, folder: Path) -> None:
    """Refuse a tokenizer without a vocabulary, which transformers makes where its files are missing, or with another
    model's."""
    for text in PROBES:
        ids = teacher.tokenizer(text)["input_ids"]
        if not ids or max(ids) >= teacher.vocab_size:
            got = f"token {max(ids)} of a vocabulary of {teacher.vocab_size}" if ids else "no tokens"
            raise GoriError(
                f"the tokenizer of {folder} gives {got} for {text!r}: put its tokenizer.json and tokenizer_config.json "
                "into the folder"
            )


def _template(tokenizer: Any) -> str:
    """The chat template that rows with tools are written in; empty where there is none."""
    found = tokenizer.chat_template or ""
    return found if isinstance(found, str) else found.get("tool_use") or found.get("default") or ""


def _need_accelerate(device_map: str) -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise GoriError(f"--device-map {device_map} needs accelerate: pip install accelerate, or use --device-map cpu")


def parameters(model: nn.Module) -> dict[str, int]:
    """All parameters, and those that one token uses: of routed experts only the chosen ones."""
    cfg: Any = model.config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(cfg, name, 0))), 0)
    everything = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("packed"))]
    sizes = {n: p.numel() * (2 if n.endswith("packed") else 1) for n, p in everything}
    routed = sum(size for n, size in sizes.items() if ".experts." in n)
    total = sum(sizes.values())
    active = total - routed + routed * getattr(cfg, "num_experts_per_tok", 0) // experts if experts else total
    return {"parameters": total, "active_parameters": active}


@torch.inference_mode()
def probe(teacher: ForeignTeacher) -> dict[str, Any]:
    """What a teacher says after a few fixed texts: its most probable tokens with log-probabilities, and a hash of all
    its logits, which tells rounding alone."""
    digest, texts = hashlib.sha256(), []
    for text in PROBES:
        ids = torch.tensor([teacher.tokenizer(text)["input_ids"]], device=teacher.device)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        try:
            logits = teacher.logits(ids, everywhere, everywhere).float().cpu()
        except Exception as e:  # what its modelling code raises, as where the device lacks an operation
            raise GoriError(f"the teacher cannot be asked ({one_line(e)}): see its config.json and --dtype") from e
        digest.update(np.ascontiguousarray(logits.numpy()).tobytes())
        value, top = logits[-1].log_softmax(-1).topk(PROBE_IDS)
        texts.append({"ids": ids[0].tolist(), "top": top.tolist(), "logprob": [round(v, 6) for v in value.tolist()]})
    return {"sha256": digest.hexdigest(), "texts": texts}


def _check_files(folder: Path, files: dict[str, int], directory: Path) -> None:
    for name, size in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            found = f"has {path.stat().st_size} bytes" if path.exists() else "is missing"
            raise GoriError(f"{path} {found}, it had {size} when {directory} was made: restore it, or import it again")


def _check_probe(then: dict[str, Any], now: dict[str, Any], dtype: str, directory: Path) -> None:
    """Equal to the bit, or other by rounding alone, which is said; anything else is another teacher."""
    if then["sha256"] == now["sha256"]:
        return
    worst = 0.0
    for a, b in zip(then["texts"], now["texts"], strict=True):
        known = dict(zip(b["top"], b["logprob"], strict=True))
        shared = [abs(v - known[i]) for i, v in zip(a["top"], a["logprob"], strict=True) if i in known]
        if a["ids"] != b["ids"] or len(shared) < PROBE_IDS - 1:
            worst = float("inf")
        worst = max([worst, *shared])
    if worst > TOLERANCE[dtype]:
        raise GoriError(
            f"the teacher of {directory} no longer says what it said when it was imported (log-probabilities differ by "
            f"{worst:.3g} nats, rounding explains {TOLERANCE[dtype]}): weights, tokenizer or transformers are others; "
            "import it again"
        )
    console.log(f"teacher {directory.name}: rounds otherwise than when it was imported (by {worst:.2g} nats)")
