"""Where the nodes of a job meet: an address, whether it is this machine's, and this machine's own."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import NamedTuple

from modelyard.errors import RunFailed


class Endpoint(NamedTuple):
    host: str
    port: int


def endpoint_of(text: str) -> Endpoint:
    """`HOST:PORT`, `[IPv6]:PORT`. Raises ValueError with what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError(f"'{text}' is not HOST:PORT; write {text.strip(':') or 'HOST'}:29500, say")
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise ValueError(f"'{text}': the port is a number from 1 to 65535, not '{port}'")
    return Endpoint(host.removeprefix("[").removesuffix("]"), int(port))


def is_here(host: str) -> bool:
    """Whether `host` is this machine: by its name, or by an address that can be listened at."""
    if host in (socket.gethostname(), socket.getfqdn()):
        return True
    for family, kind, protocol, _, address in _addresses(host):
        with socket.socket(family, kind, protocol) as trial:
            try:
                trial.bind((address[0], 0, *address[2:]))
            except OSError:
                continue
            return True
    return False


def own_address(endpoint: Endpoint) -> str:
    """How other nodes reach this machine: by the address that it has on its way to where they meet."""
    for family, _, _, _, address in _addresses(endpoint.host):
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            try:
                way.connect(address)  # nothing is sent
            except OSError:
                continue
            own = str(way.getsockname()[0])
        # A machine's name may mean 127.0.1.1 to itself (/etc/hosts of Debian), which says nothing to others.
        if not ipaddress.ip_address(own.partition("%")[0]).is_loopback or _is_loopback(endpoint.host):
            return own
    return socket.getfqdn()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def wait_for_host(endpoint: Endpoint, seconds: float) -> None:
    """Until somebody listens there. Raises RunFailed when that has taken so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(endpoint, timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"nobody answers at {endpoint.host}:{endpoint.port} within {seconds:g} s ({error.strerror or error}); "
                    "the node that --rdzv-endpoint names has to run the same command"
                ) from None
        time.sleep(0.5)


def _addresses(host: str) -> list[tuple[int, int, int, str, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return found  # type: ignore[return-value]  # of the internet, both kinds
