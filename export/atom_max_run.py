"""What stands in for ATOM-Max on a machine without it: the saved reference graphs, run in torch on the CPU.

The graphs hold no weights: they are run with what `checkpoint/` holds, so what is compared is the file that the
compiler will read. That is evidence about numbers, not about the device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx
from torch.export import ExportedProgram

from gori import checkpoint
from gori.artifact import read_object
from gori.errors import GoriError, MissingEngine
from gori.export import atom_max_graph as graph
from gori.export import atom_max_ops as ops
from gori.export.atom_max_plan import Plan
from gori.model import ModelConfig
from gori.runtime.eager import special_ids
from gori.runtime.session import Logits, Session, SessionInfo

REQUEST, CHECKPOINT, REFERENCE = "compile_request.json", "checkpoint", "reference"

Rounding = Callable[[str, Tensor], Tensor]
"""(operator's name, result) → the result as the arithmetic that is simulated holds it."""


def unrounded(_name: str, value: Tensor) -> Tensor:
    return value


class Program(fx.Interpreter):
    """One exported graph. Rebellions' operators are computed by gori's bodies whoever registered them."""

    def __init__(self, program: ExportedProgram, weights: list[Tensor], rounding: Rounding) -> None:
        module = program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        super().__init__(module)
        self.rounding = rounding
        self._nodes: list[fx.Node] = list(module.graph.nodes)
        nodes = [n for n in self._nodes if n.op == "placeholder"]
        self._fixed: dict[fx.Node, Any] = dict(zip(nodes[-len(weights) :], weights, strict=True))

    def fold(self, folded: dict[str, Tensor]) -> None:
        """Compute what depends on weights alone once, sharing it with other programs through `folded`: faster by half,
        and as large as the float model."""
        for node in self._nodes:
            inputs = node.all_input_nodes
            if node.op == "call_function" and inputs and all(n in self._fixed for n in inputs):
                key = f"{node.target} {[n.name for n in inputs]}"
                if key not in folded:
                    # the products with scales alone: nothing else depends on weights alone
                    folded[key] = self.call_function(node.target, fx.map_arg(node.args, self._fixed.__getitem__), {})
                self._fixed[node] = folded[key]
        used = {n for n in self._fixed if any(user not in self._fixed for user in n.users)}
        # the integers themselves are needed no more; they stay keyed, since a missing placeholder would shift the rest
        self._fixed = {n: v if n in used else None for n, v in self._fixed.items()}

    def call(self, *inputs: Tensor) -> Tensor:
        """The logits of the inputs before the weights, caches among them (written in place)."""
        return self.run(*inputs, initial_env=dict(self._fixed), enable_io_processing=False)[0]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(target, "__name__", str(target))
        if getattr(target, "namespace", "") == ops.NAMESPACE:
            target = ops.BODIES[target._schema.name.partition("::")[2]]
        value = super().call_function(target, args, kwargs)
        # a view is rounded already, and what is written into a view of a cache must reach the cache
        computed = isinstance(value, Tensor) and value.is_floating_point() and not _is_view(value, args)
        return self.rounding(name, value) if computed else value


def _is_view(value: Tensor, inputs: tuple[Any, ...]) -> bool:
    storage = value.untyped_storage().data_ptr()
    return any(isinstance(t, Tensor) and t.untyped_storage().data_ptr() == storage for t in inputs)


class Reference:
    """The prefill and decode graphs over caches of several sequences."""

    def __init__(
        self,
        cfg: ModelConfig,
        plan: Plan,
        programs: dict[int, ExportedProgram],
        weights: dict[str, Tensor],
        sequences: int,
        rounding: Rounding = unrounded,
        fold: bool = False,
    ) -> None:
        """`programs`: 0 the prefill graph, N the decode graph of N sequences."""
        self.plan, self.rounding = plan, rounding
        self.caches = graph.new_caches(cfg, plan, sequences)
        rounded = {id(t): rounding("weight", t) if t.is_floating_point() else t for t in weights.values()}
        flat = [rounded[id(t)] for _, t in sorted(weights.items())]
        self.programs = {n: Program(p, flat, rounding) for n, p in programs.items()}
        folded: dict[str, Tensor] = {}
        for program in self.programs.values() if fold else ():
            program.fold(folded)

    def prefill(self, ids: Sequence[int], start: int, sequence: int = 0) -> Tensor:
        """At most a chunk of tokens of one sequence, padded; float32 logits `[V]` of the last."""
        padded = torch.zeros(1, self.plan.chunk, dtype=torch.int64)
        padded[0, : len(ids)] = torch.tensor(list(ids))
        positions = torch.arange(start, start + self.plan.chunk, dtype=torch.int32).unsqueeze(0)
        last = torch.tensor(len(ids) - 1, dtype=torch.int16)
        table = graph.block_table(self.plan, sequence)
        with torch.inference_mode():
            return self.programs[0].call(padded, positions, table, last, *self.caches)[0, 0]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token of each of the first sequences; float32 logits `[B, V]`."""
        tables = torch.stack([graph.block_table(self.plan, i) for i in range(len(tokens))])
        ids, at = torch.tensor(tokens).unsqueeze(1), torch.tensor(positions, dtype=torch.int32).unsqueeze(1)
        with torch.inference_mode():
            return self.programs[len(tokens)].call(ids, at, tables, *self.caches)[:, 0]


def checkpoint_weights(directory: Path, cfg: ModelConfig, context: int) -> dict[str, Tensor]:
    """What the graphs take: everything in `checkpoint/`, float16 as float32, and the rotation's tables. A head that
    equals the table shares its memory."""
    path = directory / checkpoint.WEIGHTS
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise GoriError(f"{path} is not a readable safetensors file ({e}): export it again") from e
    if graph.HEAD in tensors and torch.equal(tensors[graph.HEAD], tensors[graph.EMBEDDING]):
        tensors[graph.HEAD] = tensors[graph.EMBEDDING]
    converted = {id(t): t if t.dtype == torch.int8 else t.float() for t in tensors.values()}
    floats = {n: converted[id(t)] for n, t in tensors.items()}
    return floats | graph.rope_tables(cfg, context)


def read_plan(directory: Path) -> Plan:
    """The lengths of an artifact's graphs from its compile request."""
    path = directory / REQUEST
    config = read_object(path).get("rbln_config")
    try:
        assert isinstance(config, dict)
        sizes = tuple(int(n) for n in config["decoder_batch_sizes"])
        return Plan(int(config["max_seq_len"]), int(config["prefill_chunk_size"]), sizes, int(config["num_devices"]))
    except (AssertionError, KeyError, TypeError, ValueError) as e:
        raise GoriError(f"{path} has no rbln_config of an ATOM-Max export: export it again") from e


def load_program(path: Path) -> ExportedProgram:
    """A saved reference graph; GoriError for a damaged one."""
    ops.register()
    try:
        with graph.quiet():
            return torch.export.load(path)
    except Exception as e:  # a damaged archive fails anywhere in torch's reader
        raise GoriError(f"{path} is not a graph that this torch loads ({type(e).__name__}): export it again") from e


def check() -> None:
    """MissingEngine if what running the reference graphs needs is not installed; the SDK is not among it."""
    if missing := [n for n in ("torch", "safetensors") if importlib.util.find_spec(n) is None]:
        raise MissingEngine(f"running ATOM-Max's reference graphs needs {' and '.join(missing)}: pip install gori")


class ReferenceSession(Session):
    """One sequence over the reference graphs; see Session."""

    def __init__(self, reference: Reference, info: SessionInfo) -> None:
        super().__init__()
        self.info, self._reference = info, reference

    def _run(self, ids: Sequence[int], start: int) -> Logits:
        try:
            # a padded chunk that would pass the end of the cache is no chunk that the device takes
            if len(ids) > 1 and start + self.info.chunk <= self.info.context:
                return self._reference.prefill(ids, start).numpy()
            return [self._reference.decode([t], [start + i])[0] for i, t in enumerate(ids)][-1].numpy()
        except (RuntimeError, TypeError, KeyError) as e:  # a graph that was changed, and still loads
            raise GoriError(f"the graphs in {self.info.path} do not run ({type(e).__name__}): export it again") from e


def open_directory(directory: Path, threads: int | None) -> ReferenceSession:
    """The reference graphs of an exported directory with the weights of its `checkpoint/`."""
    if threads is not None:
        torch.set_num_threads(threads)
    plan, source = read_plan(directory), directory / CHECKPOINT
    cfg = checkpoint.read_config(source)
    weights = checkpoint_weights(source, cfg, plan.context)
    programs = {
        0: load_program(directory / REFERENCE / "prefill.pt2"),
        1: load_program(directory / REFERENCE / "decode_b1.pt2"),
    }
    try:
        reference = Reference(cfg, plan, programs, weights, sequences=1, fold=True)
    except ValueError as e:
        raise GoriError(f"{directory} holds graphs of another model than its checkpoint: export it again") from e
    bos_id, eos_ids = special_ids(source)
    info = SessionInfo(
        engine="reference graphs in torch",
        engine_version=torch.__version__,
        path=str(directory),
        vocab_size=cfg.vocab_size,
        context=plan.context,
        chunk=plan.chunk,
        bos_id=bos_id,
        eos_ids=eos_ids,
        threads=torch.get_num_threads(),
        file_bytes=(source / checkpoint.WEIGHTS).stat().st_size,
        stand_in=True,
    )
    return ReferenceSession(reference, info)
