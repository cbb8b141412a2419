"""An extraction is reused exactly as long as nothing that it was made from has changed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autopar.errors import AutoparError
from autopar.extractor import cache, cached_extract

MODEL = """
import json
from pathlib import Path

import torch
from torch import nn

WIDTH = json.loads(Path(__file__).with_name("sizes.json").read_text())["width"]

def model():
    return nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

def inputs():
    return (torch.randn(8, 8),)

def loss(outputs, inputs):
    return outputs.pow(2).mean()
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "sizes.json").write_text('{"width": 16}')
    (tmp_path / "model.py").write_text(MODEL)
    return str(tmp_path / "model.py")


def kept(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").iterdir()
    return file


def is_read(tmp_path: Path) -> bool:
    return cache._read(kept(tmp_path)) is not None


def test_a_second_extraction_reads_the_first(spec: str, tmp_path: Path) -> None:
    first = cached_extract(spec, directory=tmp_path / "cache")
    written = kept(tmp_path).stat().st_mtime_ns
    assert cached_extract(spec, directory=tmp_path / "cache") == first
    assert kept(tmp_path).stat().st_mtime_ns == written


@pytest.mark.parametrize("changed", ["model.py", "sizes.json"])
def test_a_changed_file_is_extracted_again(spec: str, tmp_path: Path, changed: str) -> None:
    cached_extract(spec, directory=tmp_path / "cache")
    file = tmp_path / changed
    file.write_text(file.read_text().replace("16", "32").replace("Linear(8", "Linear( 8"))
    assert not is_read(tmp_path)
    again = cached_extract(spec, directory=tmp_path / "cache")
    width = 32 if changed == "sizes.json" else 16
    assert again.spec("0.weight").shape == (width, 8)
    assert is_read(tmp_path)


def test_precision_is_part_of_what_is_kept(spec: str, tmp_path: Path) -> None:
    full = cached_extract(spec, directory=tmp_path / "cache")
    mixed = cached_extract(spec, precision="mixed", directory=tmp_path / "cache")
    assert (full.spec(full.loss).dtype, mixed.spec(mixed.loss).dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("damage", [b"", b"not gzip", b"half"])
def test_a_damaged_file_is_replaced(spec: str, tmp_path: Path, damage: bytes) -> None:
    first = cached_extract(spec, directory=tmp_path / "cache")
    file = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    assert cached_extract(spec, directory=tmp_path / "cache") == first
    assert is_read(tmp_path)


def test_a_cache_that_cannot_be_written_is_done_without(spec: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert cached_extract(spec, directory=tmp_path / "cache").operators


def test_a_failed_extraction_leaves_nothing(spec: str, tmp_path: Path) -> None:
    Path(spec).write_text("def model(): return 1\n")
    with pytest.raises(AutoparError):
        cached_extract(spec, directory=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


READ = """
import sys
from pathlib import Path
from autopar.extractor import cached_extract
graph = cached_extract(sys.argv[1], directory=Path(sys.argv[2]))
print(len(graph.operators), "torch" in sys.modules)
"""


def test_reading_a_kept_graph_does_not_import_torch(spec: str, tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, "-c", READ, spec, str(tmp_path / "cache")]
        root = Path(cache.__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
        return done.stdout.strip()

    assert run() == "5 True"
    assert run() == "5 False"


def test_what_a_model_prints_is_no_result(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(spec).write_text(f'print("read")\n{MODEL}')
    cached_extract(spec, directory=tmp_path / "cache")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "read" in printed.err
