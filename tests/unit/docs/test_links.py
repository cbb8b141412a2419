"""Every link from one page to another leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_there_are_links_to_check() -> None:
    assert sum(len(LINK.findall(page.read_text())) for page in PAGES) > 15


def test_every_decision_is_listed() -> None:
    decisions = ROOT / "docs" / "decisions"
    listed = {target for target, _ in LINK.findall((decisions / "README.md").read_text())}
    assert listed == {p.name for p in decisions.glob("0*.md")}
