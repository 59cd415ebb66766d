"""Which Host headers the local API answers."""

import socket

import pytest

from agentd.api.guard import host_filter, is_json


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("127.0.0.1:11535", True),
        ("localhost:11535", True),
        ("LOCALHOST", True),
        ("app.localhost:1", True),
        ("[::1]:11535", True),
        ("192.168.1.7:80", True),
        (socket.gethostname(), True),
        ("", True),
        ("evil.example:11535", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
    ],
)
def test_a_loopback_listener_answers_names_of_this_device_only(header: str, allowed: bool) -> None:
    assert host_filter("127.0.0.1")(header) is allowed
    assert host_filter("::1")(header) is allowed
    assert host_filter("0.0.0.0")(header)


@pytest.mark.parametrize(
    ("kind", "json"),
    [(b"application/json", True), (b"Application/JSON; charset=utf-8", True), (b"text/plain", False), (b"", False)],
)
def test_content_types(kind: bytes, json: bool) -> None:
    assert is_json([(b"content-type", kind)]) is json
    assert not is_json([])
