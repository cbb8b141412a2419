"""Writes the pages that are made from code: schemas, the CLI reference, the pictures.

``python docs/generate.py`` writes them; the tests fail when one of them is stale.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

DOCS = Path(__file__).parent


def schema() -> str:
    from autopar.ir.plan_schema import plan_schema

    return json.dumps(plan_schema(), indent=1) + "\n"


def profiled_schema() -> str:
    from autopar.ir.profiled_graph import profiled_graph_schema

    return json.dumps(profiled_graph_schema(), indent=1) + "\n"


def cli_reference() -> str:
    """Every command's ``--help``, as a terminal of 80 columns shows it."""
    from autopar.cli import commands

    width = {"max_content_width": 80, "terminal_width": 80}
    top = click.Context(commands, info_name="autopar", **width, **commands.context_settings)
    pages = [
        "# The command line\n",
        "Made by `make docs` from what `--help` prints.\n",
        _block(commands.get_help(top)),
    ]
    for name in commands.list_commands(top):
        command = commands.commands[name]
        context = click.Context(command, info_name=name, parent=top, **width)
        pages += [f"## autopar {name}\n", _block(command.get_help(context))]
    return "\n".join(pages)


def _block(text: str) -> str:
    return "```text\n" + "\n".join(line.rstrip() for line in text.splitlines()) + "\n```\n"


def picture() -> str:
    sys.path.insert(0, str(DOCS))
    from draw import overview

    return overview()


GENERATED: dict[str, Callable[[], str]] = {
    "plan.schema.json": schema,
    "profiled_graph.schema.json": profiled_schema,
    "cli.md": cli_reference,
    "overview.svg": picture,
}


if __name__ == "__main__":
    for name, make in GENERATED.items():
        (DOCS / name).write_text(make())
        print(f"docs/{name}")
