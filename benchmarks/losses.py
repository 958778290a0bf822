"""Time and extra memory of the chunked linear-KL loss against the plain one: logits whole, gradients by autograd.

    python benchmarks/losses.py --tokens 8192 --vocabulary 131072 --width 512 --rounds 3
    python benchmarks/losses.py --dtype bfloat16 --width 2048 --teacher-width 4096 --divergence jsd \\
        --variants plain,chunked,compiled,liger,liger-triton             # a GPU, beside liger-kernel's losses

Every measurement is a process of its own, the variants in turn: loss, forward and backward once to warm up (not with
--cold), then once measured, on a GPU the median of ten. Extra memory is the peak over what the process held before
(inputs included): resident size, on a GPU what torch allocated. The plain loss of 8,192 tokens and 128k entries needs
some 18 GB. liger-kernel's losses are measured where a GPU and the package are there, and said to be missing where not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gori.chunked import cross_entropy
from gori.distill.losses import distillation_loss, sparse_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]
"""(hidden, head, teacher's hidden, teacher's head, targets, divergence) → mean loss of a token."""


def plain(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, divergence: str) -> Tensor:
    with torch.no_grad():
        p = (th @ tW.T).float().log_softmax(-1)
    q = (h @ W.T).float().log_softmax(-1)
    kl = partial(torch.nn.functional.kl_div, log_target=True, reduction="batchmean")
    if divergence == "forward_kl":
        return kl(q, p)
    m = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * kl(m, p) + 0.5 * kl(m, q)


def chunked(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, divergence: str) -> Tensor:
    return distillation_loss(h, W, th, tW, y, {divergence: 1.0})[0]


def compiled(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, divergence: str) -> Tensor:
    return distillation_loss(h, W, th, tW, y, {divergence: 1.0}, compiled=True)[0]


def cached(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, _: str) -> Tensor:
    ids = (y.unsqueeze(1) + torch.arange(12, device=y.device)) % len(W)
    return sparse_loss(h, W, ids, torch.full(ids.shape, 1 / 12, device=y.device), y, {"forward_kl": 1.0})[0]


def plain_ce(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, _: str) -> Tensor:
    return torch.nn.functional.cross_entropy((h @ W.T).float(), y)


def chunked_ce(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, _: str) -> Tensor:
    return cross_entropy(h, W, y)


BETA = {"forward_kl": 0.0, "jsd": 0.5}


def liger(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction  # pyright: ignore

    return LigerFusedLinearJSDFunction.apply(h, W, th, tW, y, None, None, 0.0, 1.0, BETA[divergence])


def liger_triton(h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor, divergence: str) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD  # pyright: ignore

    return LigerFusedLinearJSD(BETA[divergence])(h, W, th, tW, None)


VARIANTS: dict[str, Loss] = {
    "plain": plain,
    "chunked": chunked,
    "compiled": compiled,
    "12-entries": cached,
    "plain-ce": plain_ce,
    "chunked-ce": chunked_ce,
    "liger": liger,
    "liger-triton": liger_triton,
}
REPEATS = 10
"""Measurements of one process on a GPU."""


def resident_bytes(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Peak:
    """The largest resident size from now on; the kernel's own peak cannot be reset without rights, so it is sampled."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())

    def end(self) -> int:
        self._stop.set()
        self._thread.join()
        return max(self.bytes, resident_bytes())


def measure(a: argparse.Namespace) -> dict[str, float]:
    """One measurement in this process."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    g, dtype, loss = torch.Generator(device).manual_seed(0), getattr(torch, a.dtype), VARIANTS[a.one]

    def drawn(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, generator=g, device=device) * scale).to(dtype)

    h, W = drawn(a.tokens, a.width), drawn(a.vocabulary, a.width, a.width**-0.5)
    th, tW = drawn(a.tokens, a.teacher_width), drawn(a.vocabulary, a.teacher_width, a.teacher_width**-0.5)
    y = torch.randint(0, a.vocabulary, (a.tokens,), generator=g, device=device)
    h.requires_grad_(), W.requires_grad_()
    if not a.cold:
        few = a.tokens if cuda else a.tokens // 16
        for _ in range(3 if cuda else 1):
            loss(h[:few].detach().requires_grad_(), W, th[:few], tW, y[:few], a.divergence).backward()
            W.grad = None
    times, value = [], torch.zeros(())
    before, peak = torch.cuda.memory_allocated() if cuda else resident_bytes(), None if cuda else Peak()
    for _ in range(REPEATS if cuda else 1):
        h.grad = W.grad = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.monotonic()
        value = loss(h, W, th, tW, y, a.divergence)
        value.backward()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    highest = peak.end() if peak else torch.cuda.max_memory_allocated()
    assert h.grad is not None
    assert W.grad is not None
    norms = {"gradient": float(h.grad.float().norm()), "of_head": float(W.grad.float().norm())}
    return {"seconds": statistics.median(times), "extra_bytes": highest - before, "loss": value.item(), **norms}


def missing(name: str) -> str | None:
    """Why a variant cannot run here."""
    if name.startswith("liger") and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if name.startswith("liger") and not torch.cuda.is_available():
        return "its kernels need a GPU"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default="plain,chunked,liger")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--divergence", choices=tuple(BETA), default="forward_kl")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a) | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    results: dict[str, list[dict[str, float]]] = {}
    for name in a.variants.split(","):
        if why := missing(name):
            print(f"{name}: not measured, {why}")
        else:
            results[name] = []
    for _ in range(a.rounds):
        for name in results:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{name}: failed with {done.returncode}: {done.stderr.strip()[-300:]}")
                continue
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    reference = next((rows for rows in results.values() if rows), None)
    if reference is None:
        sys.exit("nothing was measured")
    middle = lambda rows, key: statistics.median(r[key] for r in rows)  # noqa: E731
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one thread"
    print(f"{a.tokens} tokens, {a.vocabulary} entries, widths {a.width} and {a.teacher_width}, {a.dtype}, {where}")
    print("| variant | seconds | × | extra MiB | share | loss | gradient | of the head |")
    print("|---|---|---|---|---|---|---|---|")
    for name, rows in results.items():
        if not rows:
            continue
        s, extra = middle(rows, "seconds"), middle(rows, "extra_bytes")
        ratio, share = s / middle(reference, "seconds"), extra / middle(reference, "extra_bytes")
        tail = f"{rows[0]['loss']:.5f} | {rows[0]['gradient']:.4e} | {rows[0]['of_head']:.4e}"
        print(f"| {name} | {s:.4g} | {ratio:.2f} | {extra / 2**20:.0f} | {share:.3f} | {tail} |")
    if a.out:
        a.out.write_text(json.dumps({"settings": vars(a) | {"out": str(a.out)}, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
