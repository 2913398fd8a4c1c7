"""Text for terminals and shells."""

from __future__ import annotations

import os
import subprocess

import pytest

from nsagen.core.text import counted, printable, shell_text

ODD = ["a b", "it's", "a\tb", "a\nb", "\x1b[2J", "$(id)`id`", "\\'\t", "", "\u202eabc", "\udcff\t"]


@pytest.mark.parametrize("word", ODD)
def test_a_shell_reads_the_word(word: str) -> None:
    line = shell_text(["printf", "%s", word])
    assert line.isprintable()
    assert subprocess.check_output(["bash", "-c", line]) == os.fsencode(word)


def test_nothing_controls_a_terminal() -> None:
    assert printable("a\x1b[2J\tb \u00e9") == "a\\x1b[2J\\tb \u00e9"


def test_one_thing_has_no_s() -> None:
    assert [counted(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
