"""What the pages tell the reader to type works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autopar import cli
from autopar.ir.plan import load_plan

ROOT = Path(__file__).parents[3]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_first_block_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("README.md", "python")[0], "README.md", "exec"), {})
    assert "on 1x8xh100-sxm: 8 devices" in capsys.readouterr().out


def test_the_model_of_the_first_plan_is_planned_explained_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("model.py").write_text(blocks("docs/first_plan.md", "python")[0])
    for arguments in (
        "plan model.py --topology 4x8xh100-sxm --optimizer adamw --memory-limit 70GB -o plan.json",
        "explain plan.json",
        "export plan.json html -o plan.html",
        "diff plan.json plan.json",
        "simulate plan.json --topology 32x1xh100-sxm",
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments.split())
        assert ended.value.code == 0, capsys.readouterr().err
    plan = load_plan("plan.json")
    assert plan.world_size == 32
    assert plan.model == "model.py"
    assert plan.search.memory_limit_bytes == 70 * 10**9


@pytest.mark.parametrize("page", ["README.md", "docs/first_plan.md"])
def test_commands_in_the_pages_are_commands_with_such_options(page: str) -> None:
    text = (ROOT / page).read_text()
    found = re.findall(r"autopar ([a-z]+)((?: [^`\n#]*)?)", text)
    assert found
    for name, rest in found:
        if name in cli.commands.commands:
            options = {o for p in cli.commands.commands[name].params for o in p.opts}
            for option in re.findall(r"(?:^| )(--?[a-z][a-z-]*)", rest.split("`")[0]):
                assert option in options, f"{page}: autopar {name} {option}"
