"""What stands before every page: whom it answers, and what a browser may do with what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Nothing but our own files; no frame around a page; no form that leads elsewhere.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# A report carries its own style and script, and quotes what devices said: it runs as if it came from nowhere.
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-cache"),
)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """Answers only requests that were meant for this server, and tells browsers to be strict.

    A page of somebody else's may let its own name point at 127.0.0.1 and then read our answers as its own (DNS
    rebinding). The name that the browser asked for gives that away, so it must be one of ours.

    Args:
        app: what is guarded.
        names: host names that are ours, besides the address that a connection came in on.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] = ()) -> None:
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        self._app = app
        self._named = TrustedHostMiddleware(app, allowed_hosts=[*_LOOPBACK_NAMES, *names], www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def strict(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(b"content-security-policy", PAGE_POLICY.encode()), *_HEADERS]
                message["headers"] = [*message["headers"], *(one for one in added if one[0] not in present)]
            await send(message)

        # The address itself cannot be somebody else's name.
        app = self._app if _asked_host(scope) == _own_address(scope) else self._named
        await app(scope, receive, strict)


def _asked_host(scope: Scope) -> str:
    asked = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1").lower()
    if asked.startswith("["):
        return asked[1:].partition("]")[0]
    return asked.partition(":")[0]


def _own_address(scope: Scope) -> str | None:
    server = scope.get("server")
    return server[0] if server else None
