"""Tables that stay readable: where one is wider than the terminal, each row becomes a few lines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nsagen.cli.console import console

Cell = str | Text

BROKEN = 40
"""Characters that a cell keeps in a line at least if it is broken into several."""

INDENT = 2
"""Of the lines below a row's names."""


def print_table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    names: int = 1,
    right: Collection[str] = (),
    broken: Collection[str] = (),
) -> None:
    """Print a table on stdout.

    Args:
        names: how many of the first columns name a row; the table has a repeated one once.
        right: headings of columns of numbers.
        broken: headings of columns whose cells may be broken into several lines.
    """
    out = console()
    texts = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    widths = [
        max(len(heading), *(text.cell_len for text in column), 0)
        for heading, *column in zip(headings, *texts, strict=True)
    ]
    least = [
        min(width, BROKEN) if heading in broken else width
        for heading, width in zip(headings, widths, strict=True)
    ]
    if sum(least) + 3 * len(least) + 1 > out.width:
        out.print(_lines(title, headings, texts, names, broken, out.width - INDENT))
        return
    table = Table(title=Text(title), title_justify="left")
    for heading in headings:
        justify = "right" if heading in right else "left"
        table.add_column(heading, justify=justify, no_wrap=heading not in broken, overflow="fold")
    in_groups = names > 1 and any(a[0] == b[0] for a, b in pairwise(texts))
    for before, row in zip([[], *texts], texts, strict=False):
        if before and in_groups and before[0] != row[0]:
            table.add_section()
        table.add_row(*_blanked(row, before, names))
    out.print(table)


def _blanked(row: Sequence[Text], before: Sequence[Text], names: int) -> Iterator[Text]:
    """A row's cells; the first names are blank as long as they are those of the row before."""
    same = bool(before)
    for place, text in enumerate(row):
        same = same and place < names - 1 and text == before[place]
        yield Text() if same else text


def _lines(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[Text]],
    names: int,
    broken: Collection[str],
    width: int,
) -> RenderableType:
    """For each row its names and, below them, the other cells; those that may be broken alone.

    A cell is as wide as its column's widest, so that rows have their numbers below each other.
    """
    parts: list[RenderableType] = [Text(title, style="italic")] if title else []
    said = [
        [Text.assemble((f"{heading} ", "dim"), text) if text else Text() for text in column]
        for heading, *column in zip(headings, *rows, strict=True)
    ]
    short: list[list[int]] = [[]]  # the columns of each line
    used = 0
    for place in range(names, len(headings)):
        size = max((text.cell_len for text in said[place]), default=0) + len("; ")
        if headings[place] in broken or size == len("; "):
            continue
        if short[-1] and used + size > width + len("; "):
            short.append([])
            used = 0
        short[-1].append(place)
        used += size
    for number, row in enumerate(rows):
        parts.append(Text(" ", style="bold").join(text for text in row[:names] if text))
        found = [said[p][number] for p, h in enumerate(headings) if p >= names and h in broken]
        found += [_side_by_side([said[place] for place in line], number) for line in short]
        parts += [Padding(text, (0, 0, 0, INDENT)) for text in found if text]
    return Group(*parts)


def _side_by_side(columns: Sequence[Sequence[Text]], row: int) -> Text:
    """Cells of a row in one line, each as wide as its column."""
    line = Text()
    for column in columns:
        cell = column[row].copy()
        if column is not columns[-1]:
            cell.append("; " if cell else "  ")
            cell.pad_right(max(text.cell_len for text in column) + len("; ") - cell.cell_len)
        line.append(cell)
    return line
