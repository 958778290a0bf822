"""`gori serve` as a process: where it listens and with what key, a stop that loses no answer, and load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gori.errors import GoriError
from gori.runtime.serve_commands import read_key
from gori.runtime.serve_gate import is_loopback
from gori.runtime.serve_http import listen
from serving import ask, metric, said, write_student

ROOT = Path(__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Path) -> Path:
    return write_student(tmp_path_factory.mktemp("command") / "toy", toy_tokenizer)


@contextmanager
def process(student: Path, *more: str) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "gori", "serve", str(student), "--port", "0", "--json", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        try:
            yield json.loads(p.stdout.readline()), p
        finally:
            p.kill()


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_server_answers_what_it_accepted_and_ends_well(stop: int, student: Path) -> None:
    with process(student, "--queue", "64") as (body, p):
        url, replies = body["url"], []
        assert (body["model"], body["engine"], body["sessions"]) == ("toy", "eager", 1)
        asked = said("서울역 가자", tool_choice="required", temperature=2)
        threads = [threading.Thread(target=lambda: replies.append(ask(url, body=asked))) for _ in range(24)]
        for t in threads:
            t.start()
        while metric(url, "gori_queue_waiting") < 5:
            assert p.poll() is None
        p.send_signal(stop)
        assert p.wait(30) == 0
        for t in threads:
            t.join()
        assert [r[0] for r in replies] == [200] * 24
        with pytest.raises(OSError, match="refused"):
            ask(url, "/healthz")
        _, err = p.communicate()
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err


def test_under_load_all_that_is_accepted_is_answered_and_nothing_is_left_behind(student: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), str(student)]
    done = subprocess.run(
        [*script, "--clients", "24", "--seconds", "4"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads(done.stdout)
    assert (body["wrong"], body["wrong_count"]) == ([], 0)
    assert body["answered"] > 10
    assert len(body["outcomes"]) >= 12  # of 13 kinds of clients
    if body["open_files"]:
        assert body["open_files"][1] <= body["open_files"][0]
    assert "Traceback" not in done.stderr


def test_other_machines_are_served_only_with_a_key(gori: Run, student: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "GORI_API_KEY"}
    done = gori("serve", student, "--host", "0.0.0.0", "--port", "0", env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "0.0.0.0 can be reached from other machines and no API key is set" in done.stderr
    assert gori("serve", student, "--body-limit", "much").returncode == 2


def test_a_key_is_one_word_of_a_file_or_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GORI_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("GORI_API_KEY", "of-the-environment")
    assert read_key(None) == "of-the-environment"
    file = tmp_path / "key"
    file.write_text("of-the-file\n")
    assert read_key(file) == "of-the-file"
    for bad in ("", "\n", "two words", "열쇠"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(GoriError, match="holds no API key"):
            read_key(file)
    with pytest.raises(GoriError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_addresses_of_this_machine_are_known() -> None:
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.com", "", "127.1.example"))


def test_an_address_that_cannot_be_had_is_refused_with_the_mend() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(GoriError, match="choose another --host or --port"):
        listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(GoriError, match="cannot listen on"):
        listen("192.0.2.1", 0)
