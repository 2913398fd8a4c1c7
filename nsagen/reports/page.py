"""The page shared by all pictures: one style sheet, and the colours of the three branches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path

from nsagen.core.files import check_own
from nsagen.core.version import __version__

ALGORITHM_HUES = (
    *("#2f6db5", "#c96a12", "#23835f", "#8a5bb5", "#b0455c", "#6b7a1f"),
    *("#1f8a99", "#a8792a", "#5a6cc0", "#4f8a3c", "#a34d96", "#77808c"),
)
"""For plots and bars of more than the three branches; legible on light and dark."""


_MARK = re.compile(rb'\A<!doctype html>.*<meta name="generator" content="nsagen ', re.DOTALL)


def check_free(path: Path, remedy: str) -> None:
    """Refuse to write a page over a file that is not a page of nsagen.

    Args:
        remedy: as in `nsagen.core.files.check_own`, which says what it raises.
    """
    check_own(path, _MARK, "a page", remedy)


def page(title: str, intro: str, *sections: str) -> str:
    """A whole HTML document. `intro` and the sections are HTML; the title is text."""
    style = resources.files("nsagen.reports").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="nsagen {__version__}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{intro}\n{body}\n</body>\n</html>\n"
    )


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """A list of CSS colours and what they mean."""
    items = "".join(
        f'<li><span class="key" style="background:{colour}"></span>{escape(text)}</li>'
        for colour, text in entries
    )
    return f'<ul class="legend">{items}</ul>'
