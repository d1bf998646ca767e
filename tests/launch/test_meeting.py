"""Addresses: which are this machine's, and how others reach it."""

from __future__ import annotations

import socket

import pytest

from modelyard.errors import RunFailed
from modelyard.launch.meeting import Endpoint, endpoint_of, is_here, own_address, wait_for_host


def test_endpoints() -> None:
    assert endpoint_of("node1:29500") == Endpoint("node1", 29500)
    assert endpoint_of("[fe80::1]:1") == Endpoint("fe80::1", 1)
    for text in ("node1", ":29500", "node1:", "node1:0", "node1:65536", "node1:²"):
        with pytest.raises(ValueError, match=r"HOST:PORT|the port is a number"):
            endpoint_of(text)


def test_whose_address_it_is() -> None:
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert is_here(socket.gethostname())
    assert not is_here("192.0.2.1")  # of documentation's network (RFC 5737)
    assert not is_here("nowhere.invalid")


def test_how_others_reach_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of the way there; a name that means this machine only to itself is no way."""
    assert own_address(Endpoint("127.0.0.1", 1)) == "127.0.0.1"
    assert own_address(Endpoint("localhost", 1)) in ("127.0.0.1", "::1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node1.cluster")
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 9))],
    )
    assert own_address(Endpoint("node1", 1)) == "node1.cluster"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert own_address(Endpoint("nowhere", 1)) == "node1.cluster"


def test_the_host_may_come_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        wait_for_host(Endpoint("127.0.0.1", port), 1)
    with pytest.raises(
        RunFailed, match=f"^nobody answers at 127.0.0.1:{port} within 0.1 s \\(Connection refused\\)"
    ):
        wait_for_host(Endpoint("127.0.0.1", port), 0.1)
