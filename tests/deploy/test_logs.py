"""What a real kvernd writes to standard error: every line, under load, refusals and a flood."""

import json
import re

import pytest
import zmq

from daemon import Daemon
from load import Load, _kvern

TEXT_LINE = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>trace|debug|info|warn|error) +"
    r"(?P<event>[^=\"]*?)(?P<facts>( \w+=([^\s\"=]+|\"([^\"\\]|\\.)*\"))*)$"
)
FLOOD = 200


def run(folder, log_format: str) -> list[str]:
    """Load, a flood of what is no message, a client that is refused, and a graceful stop."""
    daemon = Daemon(folder, {"log.format": log_format, "log.level": "debug"}).start()
    try:
        load = Load(daemon.address, chunks=2)
        for prompt in range(4):
            load.store(prompt)
            load.load(prompt)
        load.close()
        with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
            peer.connect(f"ipc://{daemon.socket}")
            for _ in range(FLOOD):
                peer.send(b"no request")
            daemon.wait_metric("kvern_protocol_errors_total", lambda value: value >= FLOOD, kind="malformed")
        daemon.ctl("flush", "--all")
        refused = _kvern.Client(daemon.address, scheduler=True, client_name='odd "name"\n=1', data_plane="ucx")
        assert not refused.wait_ready(2000)
        refused.close()
        daemon.stop()
    finally:
        daemon.destroy()
    return daemon.log.read_text().splitlines()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return [json.loads(line) for line in run(tmp_path_factory.mktemp("json"), "json")]


def of(objects: list[dict], event: str) -> list[dict]:
    return [each for each in objects if each["event"] == event]


def test_every_line_is_an_object_with_time_level_and_event(objects):
    assert len(objects) > 10
    for each in objects:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["time"])
        assert each["level"] in ("debug", "info", "warn", "error")
        assert each["event"]


def test_lines_of_sessions_and_requests_carry_their_ids(objects):
    opened = {each["session"]: each["role"] for each in of(objects, "session opened")}
    assert set(opened.values()) == {"scheduler", "worker"}
    answered = of(objects, "a request was answered")
    assert {"reserve", "commit", "fetch"} <= {each["kind"] for each in answered}
    assert all(each["session"] in opened and each["request"] > 0 for each in answered)
    assert {each["session"] for each in of(objects, "session ended")} <= set(opened)


def test_a_refused_client_is_named_and_cannot_forge_a_line(objects):
    refusals = of(objects, "a client was refused")
    assert refusals and all(each["client"] == 'odd "name"?=1' for each in refusals)
    assert all("UCX" in each["why"] for each in refusals)


def test_of_a_flood_some_lines_are_written_and_the_rest_is_counted(objects):
    flood = of(objects, "a peer sent what is no request")
    told = [each for each in of(objects, "lines were left out") if each["of"] == "a peer sent what is no request"]
    assert 0 < len(flood) < FLOOD
    assert len(flood) + sum(each.get("left_out", 0) for each in flood + told) == FLOOD


def test_text_lines_parse_too(tmp_path):
    lines = run(tmp_path, "text")
    for line in lines:
        assert TEXT_LINE.match(line), line
    assert any(" info  kvernd is ready version=" in line for line in lines)
