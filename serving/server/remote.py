"""Pictures from http(s) addresses, fetched without reaching anything private.

A name is resolved once, every address it stands for must be public, and the connection goes to that very address, so
that a name cannot change its meaning in between. Redirects are followed a few times, each checked like the first.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from perceptiondlm.serving.server.limits import Limits, Refused, too_large


PORTS = {"http": 80, "https": 443}
MOST_REDIRECTS = 3
CHUNK_BYTES = 2**16


def fetch(address: str, name: str, limits: Limits) -> bytes:
    """The contents behind an address.

    Raises:
        Refused: it is not public, answers with an error or too slowly, or its contents are too large.
    """
    deadline = time.monotonic() + limits.url_seconds
    for _ in range(MOST_REDIRECTS + 1):
        found = _get(address, name, limits, deadline)
        if isinstance(found, bytes):
            return found
        address = urljoin(address, found)
    raise Refused(400, f"{name}: the address redirects more than {MOST_REDIRECTS} times", "url")


def public_address(host: str, port: int, name: str) -> str:
    """An address that a host name stands for, where all of them are public.

    Raises:
        Refused: one is private, local or reserved, or there is none.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise Refused(400, f"{name}: the host {host[:80]!r} cannot be found", "url") from error
    addresses = [ipaddress.ip_address(str(address).partition("%")[0]) for address in found]
    for address in addresses:
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and inner.is_global) or address.is_multicast:
            raise Refused(400, f"{name}: the host {host[:80]!r} is not a public one", "url")
    return str(addresses[0])


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name that was asked for."""

    def __init__(self, scheme: str, host: str, port: int, address: str, timeout: float):
        super().__init__(host, port, timeout=timeout)
        self.scheme, self.address = scheme, address

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)
        if self.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def hang_up(self) -> None:
        """End what is being read, from another thread: a server that sends a byte now and then cannot hold it."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def _get(address: str, name: str, limits: Limits, deadline: float) -> bytes | str:
    """The contents behind an address, or where it redirects to."""
    try:
        parts = urlsplit(address)
        scheme, host = parts.scheme.lower(), parts.hostname
        port = parts.port or PORTS.get(scheme, 0)
    except ValueError as error:
        raise Refused(400, f"{name} is no address: {error}", "url") from error
    if scheme not in PORTS or not host or parts.username is not None:
        raise Refused(400, f"{name}: accepted are http and https addresses without a user", "url")
    left = max(deadline - time.monotonic(), 0.1)
    connection = _Connection(scheme, host, port, public_address(host, port, name), left)
    timer = threading.Timer(left, connection.hang_up)
    timer.start()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request("GET", path, headers={"User-Agent": "perceptiondlm", "Accept": "image/*"})
        reply = connection.getresponse()
        if 300 <= reply.status < 400 and (target := reply.getheader("Location")):
            return target
        if reply.status != 200:
            raise Refused(400, f"{name}: {host} answers with status {reply.status}", "url")
        return _body(reply, name, limits)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Refused(400, f"{name}: {host} cannot be read ({type(error).__name__})", "url") from error
    finally:
        timer.cancel()
        connection.close()


def _body(reply: http.client.HTTPResponse, name: str, limits: Limits) -> bytes:
    chunks, size = [], 0
    while chunk := reply.read1(CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > limits.max_body_bytes:
            raise too_large(f"{name} has more than {limits.max_body_bytes} bytes")
    if reply.length:  # it was ended before its declared length, by the other side or by the deadline
        raise Refused(400, f"{name} did not arrive whole within {limits.url_seconds:g} s", "url")
    return b"".join(chunks)
