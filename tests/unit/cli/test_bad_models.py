"""Models that cannot be planned: what is wrong with them is said, and nothing is written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autopar import cli

BROKEN = {
    "branches": (
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.linear = torch.nn.Linear(8, 8)\n"
        "    def forward(self, x):\n"
        "        y = self.linear(x)\n"
        "        return (y * 2 if y.sum() > 0 else y).sum()\n"
        "def model(): return Model()\n"
        "def inputs(): return (torch.ones(8, 8),)\n",
        4,
        ("branches.py:8", "depends on the values of tensors"),
    ),
    "nested": (
        "import torch\n"
        "def model(): return torch.nn.Linear(8, 8)\n"
        "def inputs(): return {'batch': {'x': torch.ones(8, 8)}}\n",
        2,
        ("'batch' is a dict", "an argument of its own"),
    ),
    "none": (
        "import torch\n"
        "def model(): return torch.nn.Linear(8, 8)\n"
        "def inputs(): return [torch.ones(8, 8), None]\n",
        2,
        ("1 is a NoneType", "by its keyword, in a dict"),
    ),
    "frozen": (
        "import torch\n"
        "def model(): return torch.nn.Linear(8, 8).requires_grad_(False)\n"
        "def inputs(): return (torch.ones(8, 8),)\n"
        "def loss(outputs, inputs): return outputs.sum()\n",
        4,
        ("does not depend on any parameter that is trained", "frozen"),
    ),
    "nameless": ("def modle(): ...\ndef inputs(): return ()\n", 2, ("has no model()", "modle")),
    "unfinished": ("def model(:\n", 2, ("unfinished.py:1", "SyntaxError")),
    "failing": ("def model(): raise OSError('no disk')\ndef inputs(): ...\n", 2, ("no disk",)),
}

ODD = (
    "import torch\n"
    "def model(): return torch.nn.Sequential(torch.nn.Linear(13, 13), torch.nn.ReLU())\n"
    "def inputs(): return (torch.ones(7, 13),)\n"
    "def loss(outputs, inputs): return outputs.square().mean()\n"
)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_model_is_said_with_its_place(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, code, says = BROKEN[name]
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    output = tmp_path / "plan.json"
    assert run("plan", path, "--topology", "1x4xh100-sxm", "-o", output) == code
    printed = capsys.readouterr()
    assert [words for words in says if words not in printed.err] == []
    assert "def forward" not in printed.err  # torch's print of the half-traced graph
    assert printed.out == ""
    assert not output.exists()


def test_a_model_whose_sizes_nothing_divides_is_replicated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(ODD)
    assert run("plan", path, "--topology", "1x4xh100-sxm", "--mesh", "4") == 0
    printed = capsys.readouterr().out
    assert "data_parallel divides nothing here: the sizes do not allow it" in printed
    assert "megatron divides nothing here: the sizes do not allow it" in printed


def test_ctrl_c_while_a_model_is_read_ends_with_130_and_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text(
        "import sys, time\nsys.stderr.write('reading')\nsys.stderr.flush()\ntime.sleep(600)\n"
    )
    arguments = ["plan", str(path), "--topology", "1x2xh100-sxm", "-o", str(tmp_path / "p.json")]
    with subprocess.Popen(
        [sys.executable, "-m", "autopar", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        seen = ""
        while "reading" not in seen:
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert [found.name for found in tmp_path.glob("p.json*")] == []
