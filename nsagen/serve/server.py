"""Runs the application with uvicorn, which ends within two seconds when it is asked to."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from nsagen.core.errors import InvalidInputError
from nsagen.serve.engine import Engine

GRACE_S = 1
"""Seconds that answers have to be told that the server ends, and clients to take that."""


class Server(uvicorn.Server):
    """Ends all requests with an error as soon as it is asked to end; none ends silently."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._ready = engine, ready
        self.untold: OSError | None = None
        """Why nothing could be told that requests are taken; the server ends then."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            self._ready()
        except OSError as error:
            self.untold, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, for `serve`; make it before a model is loaded, which takes long.

    Args:
        port: 0 for any that is free.

    Raises:
        InvalidInputError: the address cannot be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, UnicodeError) as error:
        found.close()
        raise _taken(host, port, error) from None
    return found


def _taken(host: str, port: int, error: Exception) -> InvalidInputError:
    said = error.strerror if isinstance(error, OSError) else None
    return InvalidInputError(
        f"serve: --host and --port must be a free address of this machine; got {host} and {port}: "
        f"{said or error}; choose others; port 0 is any that is free"
    )


def serve(app: Any, engine: Engine, address: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, or until the terminal is closed.

    Args:
        address: of `bound`.
        ready: gets the URL once requests are taken.

    Raises:
        InvalidInputError: another process took the address meanwhile.
        OSError: `ready` raised it.
    """
    host, port = address.getsockname()[:2]
    try:
        address.listen()
    except OSError as error:
        raise _taken(host, port, error) from None
    config = uvicorn.Config(
        app,
        log_config=None,  # the command's own logging
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="on",
    )
    server = Server(config, engine, lambda: ready(_url(host, port)))
    try:
        with _ended_by_hangup(server):
            server.run(sockets=[address])
    except (KeyboardInterrupt, SystemExit):  # uvicorn raises the signal again when all is done
        if not server.started:
            raise
    engine.join(GRACE_S / 2)
    if server.untold is not None:
        raise server.untold


@contextmanager
def _ended_by_hangup(server: Server) -> Iterator[None]:
    """Treat SIGHUP, unless it is ignored, as uvicorn treats SIGTERM."""
    number = getattr(signal, "SIGHUP", None)
    in_main = threading.current_thread() is threading.main_thread()
    if number is None or not in_main or signal.getsignal(number) is signal.SIG_IGN:
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
