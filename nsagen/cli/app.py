"""The command line: parses, calls, prints. Exit codes: 0 done, 1 failed or stale, 2 wrong usage.

Commands import what they need when they run, so that `nsagen --help` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast, get_args, get_type_hints

import typer

from nsagen.cli import export as exporting
from nsagen.cli import generate, plan, verbosity
from nsagen.cli import inspect as inspecting
from nsagen.cli import serve as serving
from nsagen.cli import tune as tuning
from nsagen.cli import verify as verifying
from nsagen.cli.bench import app as bench_app
from nsagen.cli.options import Json, OutDir, SpecNames
from nsagen.core.errors import InvalidInputError, NsagenError, SpecError
from nsagen.core.text import counted, printable
from nsagen.core.version import __version__

if TYPE_CHECKING:
    from nsagen.spec import Spec

app = typer.Typer(
    help="Generate, check and inspect Triton kernels for Native Sparse Attention.",
    epilog="Start with: nsagen build tiny, then TRITON_INTERPRET=1 nsagen verify tiny",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench_app, name="bench")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit."""
    _open_streams()
    _end_in_order()
    try:
        _run(arguments)
    except SystemExit as ended:
        if not _flush() and ended.code in (None, 0):
            raise SystemExit(1) from None
        raise


def _run(arguments: Sequence[str] | None) -> None:
    try:
        given = sys.argv[1:] if arguments is None else arguments
        if "" in given or any(text.endswith("=") for text in given):
            _check_paths(given)
        app(verbosity.flags_first(given), prog_name="nsagen")
    except NsagenError as error:
        # A spec's problems begin with file:line, which editors and terminals link.
        text = "\n".join(map(printable, str(error).splitlines()))
        print(text if isinstance(error, SpecError) else f"nsagen: {text}", file=sys.stderr)
        usage = isinstance(error, (SpecError, InvalidInputError))
        raise SystemExit(2 if usage else 1) from None
    except OSError as error:
        if error.filename is not None or _flush():
            _say(error, str(error.filename or ""))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("nsagen: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _flush() -> bool:
    """Whether stdout took all that was printed; if not, says so and drops the rest.

    Python would try again at its end, print an ignored exception and exit with 120. A reader that
    has left, such as `head`, is told nothing.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            _say(error, "stdout")
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return False
    return True


def _say(error: OSError, where: str) -> None:
    print(
        f"nsagen: {f'{printable(where)}: ' if where else ''}must be there, readable and writable, "
        f"with room; got {error.strerror or error}; fix that and run it again",
        file=sys.stderr,
    )


def _is_removed() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


class _Optional:
    """A stream whose text may be lost: notes and errors on a full disk must not end the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_streams() -> None:
    """Have stdin, stdout and stderr, closed by the caller or not: no file may take their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = cast("TextIO", _Optional(sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # text that the terminal cannot show


def _check_paths(given: Sequence[str]) -> None:
    """Refuse an empty path, as of an unset variable: it would mean the working folder."""
    names = set()
    for command in (*app.registered_commands, *bench_app.registered_commands):
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind, option = (*get_args(hint), None, None)[:2]
            if Path in (kind, *get_args(kind)) and isinstance(option, typer.models.OptionInfo):
                given_names = [option.default, *(option.param_decls or ())]  # as Typer has them
                own = {text for text in given_names if str(text).startswith("-")}
                names |= own or {"--" + name.replace("_", "-")}
    for name, value in pairwise((*given, "-")):
        if name == "--":
            return
        option = name.removesuffix("=") if name.endswith("=") else name if value == "" else None
        if option in names:
            raise InvalidInputError(
                f"{option} must be a path; got an empty text; "
                "give one (. is the working folder), or leave the option out"
            )


def _end_in_order() -> None:
    """Have a request to end raise SystemExit: temporary folders go, trials and workers end.

    A second request ends the process at once.
    """

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, end)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nsagen {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only results and errors, no notes or bars.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show nsagen's whole log, with times.")
    ] = False,
) -> None:
    if _is_removed():  # relative paths mean nothing there, and importing torch ends the process
        raise InvalidInputError(
            "the working folder must exist; it was removed; change to another one"
        )
    if quiet and verbose:
        raise InvalidInputError("got both --quiet and --verbose; give one at most")
    verbosity.configure(quiet=quiet, verbose=verbose)


@app.command(epilog="Example: nsagen build llama8b tiny --compile")
def build(
    specs: SpecNames,
    out: OutDir = Path("generated"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file is not up to date.")
    ] = False,
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the spec's tuning records, or the one that tune --out was given; "
            "default: that of the last build, or else beside the spec."
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile each kernel for each target, without a GPU.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Compile processes; default: one per core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the kernel package of each spec, or check that it is up to date."""
    if tuned is not None and len(specs) > 1:
        raise InvalidInputError(
            f"build: --tuned applies to one spec; got {len(specs)} specs; build them separately"
        )
    if check and compile_:
        raise InvalidInputError(
            "build: --check writes nothing but --compile does; got both; give one"
        )
    loaded = _load_all(specs)
    if check:
        _check(loaded, out, tuned, as_json)
        return
    from nsagen.aot.variants import compile_variants
    from nsagen.cli.console import print_line, progress_bar
    from nsagen.codegen.build import build as build_package
    from nsagen.core.paths import prepare_compiler_cache

    if compile_:
        prepare_compiler_cache("build --compile")
    rows = []
    for spec in loaded:
        with progress_bar(spec.name) as progress:
            compile_all = partial(compile_variants, jobs=jobs, progress=progress)
            result = build_package(
                spec, out, tuned=tuned, compile_all=compile_all if compile_ else None
            )
        row: dict[str, Any] = {
            "spec": spec.name,
            "folder": str(result.folder),
            "variants": len(result.variants),
            "written": list(result.written),
            "removed": list(result.removed),
            "notes": list(result.notes),
        }
        for note in result.notes:
            print(f"nsagen: build: {printable(note)}", file=sys.stderr)
        rows.append(row)
        if not as_json:
            changed = f"{counted(len(result.written), 'file')} written"
            kernels = counted(row["variants"], "kernel")
            removed = len(result.removed)
            print_line(f"{spec.name}: {kernels} in {row['folder']}; {changed}, {removed} removed")
            for path in result.removed:
                print_line(f"removed: {result.folder / path}")
    if as_json:
        print(json.dumps(rows, indent=1))


def _check(specs: list[Spec], out: Path, tuned: Path | None, as_json: bool) -> None:
    from nsagen.cli.console import print_line
    from nsagen.codegen.build import check, way_to_fresh

    found = {spec.name: check(spec, out, tuned=tuned) for spec in specs}
    rows = [
        {
            "spec": name,
            "path": str(out / name / stale.path),
            "state": stale.state,
            "why": stale.why,
        }
        for name, files in found.items()
        for stale in files
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            why = f" ({row['why']} changed)" if row["why"] else ""
            print_line(f"{row['state']}: {row['path']}{why}")
        for spec in specs:
            files = found[spec.name]
            what = "1 file is" if len(files) == 1 else f"{len(files)} files are"
            way = way_to_fresh(files, out / spec.name, spec.build_command(out, tuned))
            print_line(f"{spec.name}: {f'{what} not up to date; {way}' if files else 'up to date'}")
    if rows:
        raise typer.Exit(1)


app.command(epilog=exporting.EXAMPLE)(exporting.export)
app.command(epilog=generate.EXAMPLE)(generate.generate)
app.command(epilog=inspecting.EXAMPLE)(inspecting.inspect)
app.command(epilog=plan.EXAMPLE)(plan.plan)
app.command(epilog=serving.EXAMPLE)(serving.serve)
app.command(epilog=tuning.EXAMPLE)(tuning.tune)
app.command(epilog=verifying.EXAMPLE)(verifying.verify)


@app.command(epilog="Example: nsagen doctor --json")
def doctor(
    out: OutDir = Path("generated"),
    prune: Annotated[
        bool,
        typer.Option("--prune", help="First remove other versions' kernels from the user cache."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, GPUs and folders, find stale packages, and say what to do."""
    from nsagen.cli import doctor as doctors
    from nsagen.cli.console import print_line

    if prune:
        removed = doctors.prune()
        if not as_json:
            print_line(removed)
    diagnosis = doctors.examine(out)
    if as_json:
        print(json.dumps(diagnosis, indent=1))
    else:
        doctors.print_diagnosis(diagnosis)
    if diagnosis["problems"]:
        raise typer.Exit(1)


def _load_all(names: list[str]) -> list[Spec]:
    """Load every spec before any is used, so that a bad one changes nothing."""
    from nsagen.spec import load_spec

    loaded: list[Spec] = []
    errors = []
    for name in names:
        try:
            loaded.append(load_spec(name))
        except SpecError as error:
            errors.append(str(error))
    if errors:
        raise SpecError("\n".join(errors))
    counts = Counter(spec.name for spec in loaded)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise SpecError(f"build: each spec needs its own name; got {twice[0]!r} twice; rename one")
    return loaded
