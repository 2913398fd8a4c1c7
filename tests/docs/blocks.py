"""The fenced blocks of a Markdown page, and running them as a reader would."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from nsagen.cli.app import app, main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

FENCE = re.compile(r"```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')

NEEDS_GPU = ("tune", "bench")
"""Commands that only a GPU can run; without one, their arguments are parsed."""

NEEDS_AN_END = ("serve",)
"""Commands that run until they are ended; their arguments are parsed."""

LANGUAGES = ("diff", "jinja", "json", "python", "sh", "text", "yaml")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that its title names, and where it is."""

    page: str
    line: int
    language: str
    title: str | None
    text: str


def blocks_of(path: Path) -> Iterator[Block]:
    content = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(content):
        title = TITLE.search(found[2])
        line = content.count("\n", 0, found.start()) + 1
        yield Block(path.name, line, found[1], title and title[1], found[3])


@dataclass
class Reader:
    """Follows a page in an empty folder. `interpreting`: TRITON_INTERPRET=1 is on."""

    folder: Path
    interpreting: bool
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    ran: int = 0

    def follow(self, block: Block) -> None:
        where = f"{block.page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: no such language: {block.language}"
        if block.title:
            assert ".." not in block.title
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            if block.language == "python":
                ast.parse(block.text)
            return
        match block.language:
            case "python":
                # A filename that tracebacks can show; line numbers are the page's.
                padded = "\n" * block.line + block.text
                exec(compile(padded, str(DOCS / block.page), "exec"), self.names)
            case "yaml":
                yaml.safe_load(block.text)
            case "json":
                json.loads(block.text)
            case "sh":
                for line in block.text.splitlines():
                    self.shell(line, where)
        self.ran += 1

    def shell(self, line: str, where: str) -> None:
        words = shlex.split(line, comments=True)
        environment = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if not words:
            return
        match words[0]:
            case "nsagen":
                self.nsagen(words[1:], environment, where)
            case "python" | "torchrun" if script := [w for w in words if w.startswith("examples/")]:
                parse_example(script[0], words[words.index(script[0]) + 1 :])
            case "python":
                runpy.run_path(str(self.folder / words[1]), run_name="__main__")
            case "make":
                targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
                assert set(words[1:]) <= targets, f"{where}: make has no {words[1:]}"
            case "pip" | "git" | "cd":
                pass  # changes the machine
            case _:
                raise AssertionError(f"{where}: nobody has said how to run {words[0]!r}")

    def nsagen(self, arguments: list[str], environment: dict[str, str], where: str) -> None:
        commands: dict[str, Any] = typer.main.get_command(app).commands
        interpreted = environment.pop("TRITON_INTERPRET", None)
        if arguments[0] in NEEDS_GPU and arguments[0] not in commands:
            pytest.skip(f"{where}: nsagen has no {arguments[0]} yet")
        is_parsed = arguments[0] in (*NEEDS_GPU, *NEEDS_AN_END)
        if is_parsed or (interpreted and not self.interpreting):
            parse(commands[arguments[0]], arguments)
            return
        old = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            with pytest.raises(SystemExit) as end:
                main(arguments)
        finally:
            for name, value in old.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        code = end.value.code
        assert not code, f"{where}: exit code {code}: nsagen {' '.join(arguments)}"


def parse(command: Any, arguments: list[str]) -> None:
    """Check a command's arguments, and a sub-command's, without running it."""
    name, *rest = arguments
    if subcommands := getattr(command, "commands", None):
        assert rest[0] in subcommands, f"nsagen {name} has no {rest[0]}"
        parse(subcommands[rest[0]], rest)
    else:
        command.make_context(name, rest)


def parse_example(script: str, arguments: list[str]) -> None:
    """Check the arguments of an example that takes minutes and more to run."""
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        runpy.run_path(str(ROOT / script))["parse"](arguments)
    finally:
        sys.path.pop(0)


def follow(page: str, folder: Path) -> Reader:
    """Run every block of a page, in order, in `folder`, which is the working folder."""
    reader = Reader(folder, os.environ.get("TRITON_INTERPRET") == "1")
    sys.path.insert(0, str(folder))
    known = set(sys.modules)
    try:
        for block in blocks_of(DOCS / page):
            reader.follow(block)
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            source = getattr(sys.modules[name], "__file__", None)
            if source and Path(source).is_relative_to(folder):
                del sys.modules[name]
    return reader
