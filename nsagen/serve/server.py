"""Runs the application with uvicorn, which ends within two seconds when it is asked to."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from nsagen.serve.engine import Engine

GRACE_S = 1
"""Seconds that answers have to be told that the server ends, and clients to take that."""


class Server(uvicorn.Server):
    """Ends all requests with an error as soon as it is asked to end; none ends silently."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)


def serve(app: Any, engine: Engine, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        port: 0 for any that is free.
        ready: gets the URL once requests are taken.

    Raises:
        SystemExit: the address cannot be had; uvicorn has logged why.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,  # the command's own logging
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        lifespan="on",
    )
    bound = config.bind_socket()
    server = Server(config, engine, lambda: ready(_url(bound)))
    try:
        server.run(sockets=[bound])
    except (KeyboardInterrupt, SystemExit):  # uvicorn raises the signal again when all is done
        if not server.started:
            raise
    engine.join(GRACE_S / 2)


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
