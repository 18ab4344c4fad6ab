"""Binds the dashboard to an address of this machine and serves it until it is interrupted."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

from edgedeploy.errors import BackendMissing, UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
# Pages take milliseconds; whoever is not done by then reads no more.
_GRACE_S = 3


def demand_extra() -> None:
    """Refuse where the packages of the extra `serve` are not installed.

    Raises:
        BackendMissing: naming what installs them.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendMissing(f"{error.name} is not installed here; pip install 'edgedeploy[serve]'") from error


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address of this machine; port 0: any free one.

    Raises:
        UsageError: the port is taken, not ours to take, or the address is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address: {error}; 127.0.0.1 is this machine alone") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # Asked now: two servers that share a port by SO_REUSEADDR would find out when they listen.
        bound.listen()
    except OSError as error:
        bound.close()
        reasons = {
            errno.EADDRINUSE: "is taken by another program, perhaps another edgedeploy serve; name another with "
            "--port, or take any free one with --port 0",
            errno.EACCES: "may only be taken by root; name one above 1023 with --port",
            errno.EADDRNOTAVAIL: "cannot be taken, because the address is none of this machine's; 127.0.0.1 is",
        }
        reason = reasons.get(error.errno or 0, f"cannot be taken: {error.strerror}")
        raise UsageError(f"port {port} of {host} {reason}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address of the first page; of a socket that listens everywhere, as this machine calls it."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if bound.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def configuration(app: ASGIApp) -> uvicorn.Config:
    """Return how the dashboard is served: it says little of itself, and believes no proxy."""
    import uvicorn

    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_S,
    )


def serve(app: ASGIApp, bound: socket.socket) -> None:
    """Serve until SIGINT; SIGTERM ends the process as it does by default."""
    import uvicorn

    try:
        uvicorn.Server(configuration(app)).run(sockets=[bound])
    except KeyboardInterrupt:  # raised again by uvicorn after it has shut down
        return
