"""The command line, one file a command."""

from __future__ import annotations

import signal


def main() -> None:
    """Run `nsagen`; always ends in SystemExit, or by the signal of a Ctrl-C while it starts."""
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an import that it stops ends in a traceback
    from nsagen.cli.app import main as run

    if asked is signal.default_int_handler:
        signal.signal(signal.SIGINT, asked)
    run()
