"""What is typed most often must not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "ortools", "transformers", "rich")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has after ``code``."""
    report = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    names: list[str] = eval(found.stdout.splitlines()[-1])
    return set(names)


def test_importing_autopar_imports_nothing_heavy() -> None:
    assert loaded_by("import autopar") == set()
    assert loaded_by("import autopar.api, autopar.ir.plan") == set()


def test_this_test_would_notice() -> None:
    assert "torch" in loaded_by("import autopar.extractor.trace")


@pytest.mark.parametrize(
    "arguments", ['["--help"]', '["plan", "--help"]', '["--version"]', '["list", "topologies"]']
)
def test_help_and_lists_import_nothing_heavy(arguments: str) -> None:
    run = f"import autopar.cli\ntry: autopar.cli.main({arguments})\nexcept SystemExit: pass"
    assert loaded_by(run) == set()


def test_explaining_a_plan_does_not_import_torch() -> None:
    run = "from autopar.api import load_plan, rules_of\nfrom autopar.exporters import text"
    assert loaded_by(run) <= {"rich", "numpy"}
