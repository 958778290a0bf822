"""The vehicle example is built and run: on a real artifact, and on an engine that answers what a test wants.

Its units for systemd are checked; a running systemd is not here: docs/embedding.md says what that leaves open.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedded import ROOT, Service, ask, done
from gori import incar

VEHICLE = ROOT / "examples" / "vehicle"
UNIT = VEHICLE / "gori-vehicle.service"
CALLBACK = {"functionName", "status", "message", "mode", "data"}

ENGINE = r"""
// Answers with the utterance itself; "hang" until it is cancelled, "stuck" whether it is or not.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include "gori.h"
static std::atomic<bool> cancelled;
extern "C" gori_status gori_call(gori_session*, const char* said, const gori_call_options*, gori_result* out) {
  cancelled = false;
  const bool stuck = !std::strcmp(said, "stuck");
  while (stuck || !std::strcmp(said, "hang")) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (cancelled && !stuck) return GORI_CANCELLED;
  }
  out->length = std::strlen(said);
  std::memcpy(out->text, said, out->length + 1);
  return GORI_OK;
}
extern "C" void gori_cancel(gori_session*) { cancelled = true; }
"""


@pytest.fixture(scope="session")
def program(runner: Path) -> Path:
    """gori-vehicle, built by its own CMakeLists.txt."""
    out = ROOT / "build" / "vehicle"
    fresh = ["-G", "Ninja"] if shutil.which("ninja") and not (out / "CMakeCache.txt").exists() else []
    done("cmake", "-S", VEHICLE, "-B", out, f"-DGORI_LIBRARY={runner / 'libgori.so'}", *fresh)
    done("cmake", "--build", out)
    return out / "gori-vehicle"


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that stands before libgori and answers what is asked for."""
    out = tmp_path_factory.mktemp("engine")
    (out / "engine.cpp").write_text(ENGINE)
    done(
        "c++", "-std=c++17", "-shared", "-fPIC", "-I", ROOT / "runtime/cpp", out / "engine.cpp", "-o", out / "engine.so"
    )
    return out / "engine.so"


Answers = list[list[dict[str, str]]]
Said = Callable[..., tuple[Answers, list[dict[str, Any]]]]


@pytest.fixture
def say(program: Path, car: Path, engine: Path, tmp_path: Path) -> Said:
    """Lines to the program with the engine of the tests, and signals → callbacks of each line, messages on the bus."""

    def run(*lines: str, **signals: float) -> tuple[Answers, list[dict[str, Any]]]:
        (tmp_path / "signals.json").write_text(json.dumps(signals))
        (tmp_path / "bus").write_text("")
        options = [
            "--artifact",
            car,
            "--signals",
            tmp_path / "signals.json",
            "--bus",
            tmp_path / "bus",
            "--deadline-ms",
            100,
        ]
        environment = {**os.environ, "LD_PRELOAD": str(engine)}
        out = done(program, *options, input="\n".join(lines), env=environment)
        frames = [json.loads(line) for line in (tmp_path / "bus").read_text().splitlines()]
        return [json.loads(line) for line in out.stdout.splitlines()], frames

    return run


def call(name: str, **arguments: object) -> str:
    return json.dumps([{"name": name, "arguments": arguments}], ensure_ascii=False)


def test_the_cars_own_table_is_the_tools_that_the_model_was_trained_on(program: Path) -> None:
    table = json.loads(done(program, "--functions").stdout)
    tools = incar.tools()
    for tool in tools:
        del tool["function"]["description"]
        for parameter in tool["function"]["parameters"]["properties"].values():
            parameter.pop("description", None)
    assert table == tools


def test_a_real_artifact_answers_as_the_runner_does_and_every_call_is_one_that_the_car_takes(
    program: Path, runner: Path, car: Path, tmp_path: Path
) -> None:
    lines = ["창문 열어줘", "open the rear window", "22도", "x" * 50, "", "운전석 열선 2단계", "🚗"]
    (tmp_path / "signals.json").write_text('{"speed_kmh": 0}')
    said = {"input": "\n".join(lines)}
    out = done(program, "--artifact", car, "--signals", tmp_path / "signals.json", "--bus", tmp_path / "bus", **said)
    answers = [json.loads(line) for line in out.stdout.splitlines()]
    calls = [json.loads(line) for line in done(runner / "gori-call", car, **said).stdout.splitlines()]
    assert len(answers) == len(calls) == len(lines)
    for callbacks, wanted in zip(answers, calls, strict=True):
        assert [c["functionName"] for c in callbacks] == ([w["name"] for w in wanted] or [""])
        for callback in callbacks:
            assert callback.keys() == CALLBACK
            assert callback["status"] in {"success", "asking", "fail"}
            assert all(isinstance(item, dict) for item in json.loads(callback["data"]))


def test_a_call_becomes_messages_one_for_each_place_that_is_meant(say: Said) -> None:
    answers, frames = say(
        call("SET_WINDOW", window="rear", action="close", percent=30), call("NAVIGATE", place='"서울"\n')
    )
    assert [a[0]["status"] for a in answers] == ["success", "success"]
    assert frames == [
        {"message": "window.move", "fields": {"window": "rear_left", "open_percent": 70}},
        {"message": "window.move", "fields": {"window": "rear_right", "open_percent": 70}},
        {"message": "navigation.start", "fields": {"place": '"서울"\n'}},
    ]


def test_every_function_reaches_the_bus_or_reports(say: Said) -> None:
    sample = {"string": "집", "boolean": True, "integer": 1, "number": 90}
    lines = []
    for tool in incar.tools():
        parameters = tool["function"]["parameters"]["properties"]
        values = {n: p.get("enum", [p.get("minimum", sample[p["type"]])])[0] for n, p in parameters.items()}
        lines.append(call(tool["function"]["name"], **{n: "07:30" if n == "time" else v for n, v in values.items()}))
    answers, frames = say(*[line for line in lines for _ in range(2)], speed_kmh=0, battery=71)
    statuses = {a[0]["functionName"]: a[0]["status"] for a in answers}
    # asked first: the line after is no yes, so it asks again
    assert {n for n, s in statuses.items() if s == "asking"} == {"SEND_MESSAGE"}
    assert {n for n, s in statuses.items() if s == "fail"} == {"SET_CRUISE"}
    assert list(statuses.values()).count("success") == len(lines) - 2
    assert len({f["message"] for f in frames}) == len(lines) - 3
    status = next(a[0] for a in answers if a[0]["functionName"] == "GET_VEHICLE_STATUS")
    assert json.loads(status["data"]) == [{"item": "battery", "value": 71}]


@pytest.mark.parametrize(
    ("line", "status", "why"),
    [
        (call("SET_TEMPERATURE", temperature=40), "error", "temperature is 40, allowed is 17 to 29"),
        (call("SET_FAN_SPEED", level=2.5), "error", "level is 2.5, allowed is 1 to 8"),
        (call("SET_WINDOW", action="smash"), "error", "allowed is one of open, close"),
        (call("SET_STEERING_HEATER", on="true"), "error", "allowed is true or false"),
        (call("ADD_REMINDER", text="x", time="29:00"), "error", "a time of day"),
        (call("CANCEL_NAVIGATION", now=True), "error", "no argument now"),
        (call("EJECT_SEAT"), "error", "no function EJECT_SEAT"),
        (call("SET_TEMPERATURE"), "asking", "temperature is missing: 17 to 29"),
        (call("TUNE_RADIO"), "asking", "frequency or station is missing"),
        ("[]", "fail", "no function for that"),
        ("{", "error", "not a list of calls"),
        ("[" * 100, "error", "not a list of calls"),
        ('[{"name": "SET_STEERING_HEATER"}]', "error", "no arguments"),
        ('[{"name": "A", "name": "B", "arguments": {}}]', "error", "not a list of calls"),
        ('[{"name": "SET_TEMPERATURE", "arguments": {"temperature": nan}}]', "error", "not a list of calls"),
    ],
)
def test_what_is_out_of_range_is_told_and_moves_nothing(line: str, status: str, why: str, say: Said) -> None:
    ((only,),), frames = say(line, speed_kmh=0)
    assert only["status"] == status
    assert why in only["message"]
    assert not frames


def test_one_bad_call_keeps_the_whole_answer_from_being_done(say: Said) -> None:
    good, bad = json.loads(call("SET_STEERING_HEATER", on=True)), json.loads(call("SET_FAN_SPEED", level=99))
    (callbacks,), frames = say(json.dumps(good + bad))
    assert [(c["functionName"], c["status"]) for c in callbacks] == [
        ("SET_STEERING_HEATER", "fail"),
        ("SET_FAN_SPEED", "error"),
    ]
    assert not frames


@pytest.mark.parametrize("signals", [{"speed_kmh": 60}, {}])
@pytest.mark.parametrize(
    "line",
    [
        call("SET_TRUNK", part="rear", action="open"),
        call("FOLD_MIRRORS", action="fold"),
        call("MOVE_SEAT", direction="recline"),
        call("SET_DOOR_LOCK", action="unlock"),
        call("SET_HEADLIGHTS", mode="off"),
    ],
)
def test_what_is_unsafe_is_refused_while_driving_and_where_the_speed_is_not_known(
    line: str, signals: dict[str, float], say: Said
) -> None:
    ((only,), confirmed), frames = say(line, "yes", **signals)
    assert only["status"] == "fail"
    assert "stands still" in only["message"]
    assert confirmed[0]["status"] == "error"  # nothing waits for a yes: it goes to the engine as it is
    assert not frames
    assert say(line, speed_kmh=0)[0][0][0]["status"] == "success"


@pytest.mark.parametrize(
    ("word", "status", "sent"), [("네", "success", 1), ("Yes.", "success", 1), ("아니요", "fail", 0)]
)
def test_a_confirmation_is_a_yes_and_nothing_else(word: str, status: str, sent: int, say: Said) -> None:
    message = call("SEND_MESSAGE", contact="엄마", text="곧 가")
    answers, frames = say(message, word)
    assert [a[0]["status"] for a in answers] == ["asking", status]
    assert len(frames) == sent
    # anything else is the next utterance, and what waited is forgotten
    answers, frames = say(message, call("CANCEL_NAVIGATION"), word)
    assert [a[0]["status"] for a in answers] == ["asking", "success", "error"]
    assert [f["message"] for f in frames] == ["navigation.cancel"]


def test_cruise_control_asks_while_driving_and_is_refused_once_the_car_stands(say: Said) -> None:
    assert say(call("SET_CRUISE", on=True, speed=100), "ok", speed_kmh=90)[1] == [
        {"message": "drive.cruise", "fields": {"on": True, "speed": 100}}
    ]
    assert say(call("SET_CRUISE", on=True), speed_kmh=0)[0][0][0]["status"] == "fail"


def test_an_answer_that_hangs_is_cancelled_and_the_next_one_is_not(say: Said) -> None:
    answers, frames = say("hang", call("CANCEL_NAVIGATION"), "hang", call("CANCEL_NAVIGATION"))
    assert [a[0]["status"] for a in answers] == ["error", "success"] * 2
    assert "took too long" in answers[0][0]["message"]
    assert len(frames) == 2


@pytest.fixture
def service(program: Path, car: Path, engine: Path, tmp_path: Path) -> Iterator[Service]:
    made = Service(program, car, engine, tmp_path)
    made.ready()
    yield made
    if made.process.poll() is None:
        made.process.kill()
    made.process.communicate()
    made.told.close()


def test_clients_take_turns_and_only_who_was_asked_can_confirm(service: Service) -> None:
    with service.client() as one, service.client() as other:
        assert ask(one, call("SEND_MESSAGE", contact="a", text="b"))[0]["status"] == "asking"
        assert ask(other, "yes")[0]["status"] == "error"
        assert ask(one, "yes")[0]["status"] == "success"
        one.sendall(call("CANCEL_NAVIGATION").encode())  # no end of line: half a close is an end
        one.shutdown(socket.SHUT_WR)
        assert json.loads(one.recv(4096))[0]["status"] == "success"


def test_a_client_that_sends_garbage_or_leaves_harms_nobody(service: Service) -> None:
    with service.client() as long:
        assert "4096 bytes" in ask(long, "x" * 5000)[0]["message"]
    with service.client() as zero:
        assert "zero byte" in ask(zero, b"a\0b")[0]["message"]
    for _ in range(20):
        with service.client() as gone:
            gone.sendall(b"\xff\xfe\n[]\n" * 50)
    with service.client() as last:
        assert ask(last, call("CANCEL_NAVIGATION"))[0]["status"] == "success"
    assert service.stop() == (0, "")
    assert not os.path.exists(service.path)


def test_the_watchdog_hears_of_a_service_that_answers_and_no_longer_of_one_that_is_stuck(service: Service) -> None:
    for _ in range(3):
        assert service.notice() == "WATCHDOG=1"
    with service.client() as client:
        client.sendall(b"hang\n")
        assert "took too long" in json.loads(client.recv(4096))[0]["message"]
        assert service.notice() == "WATCHDOG=1"
        client.sendall(b"stuck\n")
        service.told.settimeout(0.6)  # six times the watchdog's period, twice the limit for a hang
        # those that were on their way, and then none
        with pytest.raises(TimeoutError):
            [service.notice() for _ in range(100)]


def test_the_socket_that_systemd_passes_is_served(program: Path, car: Path, engine: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "inherited")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        # puts the socket where systemd puts it and becomes the program, which is then the process that is meant
        become = (
            f"import os, sys; os.dup2({listener.fileno()}, 3); "
            "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [program, "--artifact", car, "--bus", tmp_path / "bus", "--socket", "inherited"]
        process = subprocess.Popen(
            [sys.executable, "-c", become, *map(str, command)],
            env={**os.environ, "LD_PRELOAD": str(engine)}, pass_fds=[listener.fileno()],
        )  # fmt: skip
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.settimeout(20)
                assert ask(client, call("CANCEL_NAVIGATION"))[0]["status"] == "success"
        finally:
            process.terminate()
            assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "status", "why"),
    [
        (["--artifact", "/nowhere"], 1, "Error: "),
        (["--artifact", "{car}", "--bus", "/nowhere/x"], 1, "cannot write the bus log /nowhere/x: No such file"),
        (["--artifact", "{car}", "--socket", "/" + "x" * 200], 1, "more than 107 bytes"),
        (["--artifact", "{car}", "--socket", "inherited"], 1, "systemd passed no socket"),
        (["--artifact", "{car}", "--deadline-ms", "0"], 2, "--deadline-ms is 1 to 600000, not 0"),
        ([], 2, "--artifact is needed"),
    ],
)
def test_a_wrong_start_is_told_in_a_sentence(
    options: list[str], status: int, why: str, program: Path, car: Path
) -> None:
    command = [str(program), *(o.replace("{car}", str(car)) for o in options)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60)
    assert out.returncode == status
    assert why in out.stderr


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("checking the unit needs systemd-analyze")
    command = ["systemd-analyze", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_systemd_accepts_the_units(program: Path, tmp_path: Path) -> None:
    for unit in (UNIT, VEHICLE / "gori-vehicle.socket"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/gori-vehicle", str(program)))
    out = analyze("verify", "--man=no", tmp_path / UNIT.name, tmp_path / "gori-vehicle.socket")
    # a word on units of the machine is not on ours
    ours = [line for line in out.stderr.splitlines() if "gori-vehicle" in line or "Unknown" in line]
    assert (out.returncode, ours) == (0, [])


def test_the_unit_gives_the_service_next_to_no_rights() -> None:
    out = analyze("security", "--offline=true", "--threshold=15", "--no-pager", UNIT)
    if "unrecognized option" in out.stderr:
        pytest.skip("this systemd-analyze does not rate a file")
    # 1.5 of 10; a unit without any of these settings is at 9.6
    assert out.returncode == 0, out.stdout[-600:] + out.stderr
