"""`nsagen tune --watch`: the running studies on a page of this machine, by optuna-dashboard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage

from nsagen.core.installed import require_extra

HOST = "127.0.0.1"


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests are nothing to show between lines of progress."""


class _Server(WSGIServer):
    def server_bind(self) -> None:
        """As the base class, which also looks up this machine's name: that can take seconds."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = HOST, self.server_address[1]
        self.setup_environ()


def check_watch() -> None:
    """Refuse before any work.

    Raises:
        InvalidInputError: optuna-dashboard is not installed.
    """
    require_extra("tune --watch", "watch", "optuna_dashboard")


@contextmanager
def watched(storage: BaseStorage) -> Iterator[str]:
    """Serve a storage's studies on loopback, on a free port, while the block runs.

    Args:
        storage: one of its own; the search uses another on the same studies.

    Yields:
        the page's address.
    """
    from optuna_dashboard import wsgi

    with make_server(HOST, 0, wsgi(storage), _Server, _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, name="watch", daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
