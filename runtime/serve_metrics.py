"""What a server counts, in Prometheus' text form. Used on the event loop alone, so nothing here is locked."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from gori.runtime.measure import resident_mib
from gori.runtime.serve_reply import Timed

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CLOSED = 499
"""The status under which a request is counted whose client went away; it is never sent."""


class Histogram:
    """Seconds in buckets."""

    def __init__(self) -> None:
        self.counts, self.sum_s = [0] * (len(BOUNDS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def lines(self, name: str, what: str) -> list[str]:
        out, below = [f"# HELP {name} {what}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            below += count
            out.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*out, f"{name}_sum {self.sum_s:.6f}", f"{name}_count {below}"]


class Metrics:
    """All that is counted since the start."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.whole, self.first_token = Histogram(), Histogram()

    def request(self, path: str, status: int) -> None:
        self.requests[path, status] += 1

    def answered(self, timed: Timed, seconds: float) -> None:
        """An answer that was given, `seconds` after its request had been read."""
        self.tokens["prompt"] += timed.answer.prompt_tokens
        self.tokens["completion"] += len(timed.answer.ids)
        self.tokens["forced"] += timed.answer.forced_tokens
        self.whole.add(seconds)
        self.first_token.add((timed.queue_ms + timed.answer.first_token_ms) / 1e3)

    def text(self, waiting: int, busy: int, sessions: int) -> str:
        """Prometheus' exposition format 0.0.4."""
        out = ["# HELP gori_requests_total Requests by path and status.", "# TYPE gori_requests_total counter"]
        out += [f'gori_requests_total{{path="{p}",status="{s}"}} {n}' for (p, s), n in sorted(self.requests.items())]
        out += ["# HELP gori_tokens_total Tokens of answered requests.", "# TYPE gori_tokens_total counter"]
        out += [f'gori_tokens_total{{kind="{k}"}} {self.tokens[k]}' for k in ("prompt", "completion", "forced")]
        out += _gauge("gori_queue_waiting", "Requests that wait for a session.", waiting)
        out += _gauge("gori_sessions_busy", "Sessions that answer now.", busy)
        out += _gauge("gori_sessions", "Sessions that were opened.", sessions)
        if (mib := resident_mib()) is not None:
            out += _gauge("process_resident_memory_bytes", "Resident memory.", int(mib * (1 << 20)))
        out += self.whole.lines("gori_answer_seconds", "From a request that was read to its whole answer.")
        out += self.first_token.lines("gori_first_token_seconds", "From a request that was read to its first token.")
        return "\n".join(out) + "\n"


def _gauge(name: str, what: str, value: int) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {value}"]
