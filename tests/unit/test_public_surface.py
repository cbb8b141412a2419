"""What the package shows is what it says it shows, and the documentation names all of it."""

from __future__ import annotations

import inspect
from pathlib import Path

import click
import pytest

import autopar
from autopar.cli import commands

ROOT = Path(__file__).parents[2]


def test_all_is_what_is_visible() -> None:
    assert dir(autopar) == sorted(autopar.__all__)
    for name in autopar.__all__:
        assert getattr(autopar, name) is not None


def test_other_names_are_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'paln'"):
        autopar.paln  # noqa: B018


def test_every_verb_has_a_sentence() -> None:
    for name in autopar.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(autopar, name)), name


def test_every_command_has_a_help_text_and_a_way_to_print_json() -> None:
    silent = {"export"}  # prints what its exporter makes
    for name, command in commands.commands.items():
        assert command.help, name
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
        assert name in silent or "--json" in options, name


def test_every_verb_and_command_is_in_the_documentation() -> None:
    pages = "\n".join(p.read_text() for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name in (*commands.commands, *(n for n in autopar.__all__ if n != "__version__")):
        assert f"autopar {name}" in pages or f"autopar.{name}" in pages, name


def test_an_argument_that_no_verb_has_is_an_error() -> None:
    with pytest.raises(autopar.AutoparError, match="did you mean memory_limit_bytes"):
        autopar.plan("model.py", memory_limit=10**9)  # type: ignore[call-arg]
