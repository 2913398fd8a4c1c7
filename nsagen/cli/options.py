"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.core.paths import specs_dir, visible
from nsagen.core.text import nearest
from nsagen.core.workload import CACHE_DTYPES


def _spec_names(incomplete: str) -> list[str]:
    """For shell completion: the names of ./specs and of the shipped specs."""
    folders = (Path("specs"), specs_dir())
    names = {path.stem for folder in folders for path in visible(folder.glob("*.yaml"))}
    return sorted(name for name in names if name.startswith(incomplete))


_ONE_SPEC = typer.Argument(
    metavar="SPEC",
    help="A spec's path, or the name of a shipped one.",
    autocompletion=_spec_names,
)
SpecName = Annotated[str, _ONE_SPEC]
OptionalSpecName = Annotated[str | None, _ONE_SPEC]
SpecNames = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC",
        help="Paths of specs, or names of shipped ones.",
        autocompletion=_spec_names,
    ),
]
OutDir = Annotated[Path, typer.Option("--out", help="Folder in which packages are written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Attention = Annotated[
    str | None, typer.Option("--attention", help="nsa or dense; default: the checkpoint's own.")
]
Device = Annotated[
    str | None, typer.Option("--device", help="cuda or cpu; default: a GPU if present.")
]
CacheDType = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        help="float8_e4m3fn or int8: half the cache of Native Sparse Attention; default: 16 bits.",
    ),
]
Kernels = Annotated[
    str | None,
    typer.Option("--kernels", help="Generated package to use on a GPU, such as llama8b."),
]

Drafts = Annotated[
    bool,
    typer.Option(
        "--drafts", help="Guess tokens from what the text repeats; a step verifies up to 7."
    ),
]


def check_cache_dtype(command: str, cache_dtype: str | None, attention: str | None) -> None:
    """Refuse a dtype that no cache has, and dense attention, before anything is loaded.

    Raises:
        InvalidInputError: names the option.
    """
    if cache_dtype is None:
        return
    if cache_dtype not in CACHE_DTYPES:
        remedy = nearest(cache_dtype, CACHE_DTYPES, "choose one, or leave it out")
        raise InvalidInputError(
            f"{command}: --cache-dtype must be one of {', '.join(CACHE_DTYPES)}; "
            f"got {cache_dtype!r}; {remedy}"
        )
    if attention == "dense":
        raise InvalidInputError(
            f"{command}: --cache-dtype is for Native Sparse Attention; got it with --attention "
            "dense; leave one out"
        )


@contextmanager
def in_words_of(command: str, **options: str) -> Iterator[None]:
    """Errors about an InferenceConfig name the options that it was made of.

    Args:
        options: by field of InferenceConfig, what was typed.
    """
    try:
        yield
    except (CapacityError, InvalidInputError) as error:
        text = re.sub(r"^InferenceConfig: ", f"{command}: ", str(error))
        text = re.sub(r"\bInferenceConfig\.| of InferenceConfig\b", "", text)
        for name, typed in options.items():
            text = re.sub(rf"\b{name}\b", typed, text)
        raise type(error)(text) from error


def sizes_of(text: str) -> tuple[int, ...]:
    """The numbers of `2048,16384`.

    Raises:
        InvalidInputError: one is no positive whole number.
    """
    parts = [part for part in re.split(r"[\s,]+", text) if part]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidInputError(
            f"sizes must be positive whole numbers; got {text!r}; such as 2048,16384"
        )
    return tuple(map(int, parts))
