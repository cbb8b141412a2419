"""Graphs by what they were made from, kept between runs; reading one does not import torch."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import platformdirs

from autopar.ir.graph import OperatorGraph, graph_from_json, graph_to_json
from autopar.ops import RULES


def cached_extract(
    spec: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    precision: Literal["full", "mixed"] = "full",
    directory: Path | None = None,
    refresh: bool = False,
) -> OperatorGraph:
    """``load(spec, ...).extract(precision)``, or what it gave when nothing that it reads differed.

    What it reads: the arguments, the versions of torch, transformers and autopar, and every file
    of the user's that was imported or opened while the model was built (not environment variables
    or the network). ``directory`` instead of the user's cache; ``refresh`` extracts in any case.
    """
    folder = directory or platformdirs.user_cache_path("autopar") / "graphs"
    arguments = (_absolute(spec), str(Path.cwd()), batch, sequence, precision)
    path = folder / f"{_hash(json.dumps([arguments, _versions()]).encode())}.json.gz"
    known = None if refresh else _read(path)
    if known is not None:
        return known
    graph: OperatorGraph
    with _watching() as files, redirect_stdout(sys.stderr):  # what models print is no result
        load = import_module("autopar.extractor.sources").load
        graph = load(spec, batch=batch, sequence=sequence).extract(precision)
    _write(path, graph, sorted(filter(os.path.isfile, files)))
    return graph


def _absolute(spec: str) -> str:
    prefix, rest = ("hf:", spec[3:]) if spec.startswith("hf:") else ("", spec)
    return prefix + (str(Path(rest).resolve()) if Path(rest).exists() else rest)


def _versions() -> list[str]:
    """Versions of what makes the graph; autopar's own by its text, since it is being worked on."""
    found = []
    for package in ("torch", "transformers"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    here = Path(__file__).parent
    sources = [*sorted(here.glob("*.py")), here.parent / "ir" / "graph.py"]
    with_rule = " ".join(sorted(RULES)).encode()  # composite ops without one are taken apart
    return [*found, _hash(b"".join(source.read_bytes() for source in sources) + with_rule)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_hash(path: str) -> str:
    try:
        return _hash(Path(path).read_bytes())
    except OSError:
        return "missing"


def _read(path: Path) -> OperatorGraph | None:
    """The graph, if it is there, whole, and its files are as they were."""
    try:
        data = msgspec.json.decode(gzip.decompress(path.read_bytes()))
        if any(_file_hash(name) != known for name, known in data["files"]):
            return None
        return graph_from_json(data["graph"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError):
        return None


def _write(path: Path, graph: OperatorGraph, files: list[str]) -> None:
    """All or nothing; a cache that cannot be written is no reason to fail."""
    content: dict[str, Any] = {
        "files": [[name, _file_hash(name)] for name in files],
        "graph": graph_to_json(graph),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(gzip.compress(msgspec.json.encode(content), compresslevel=1))
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
    except OSError:
        return


_watchers: list[set[str]] = []
_hooked = False


@contextmanager
def _watching() -> Iterator[set[str]]:
    """Collects the user's files that are opened or imported, now or by an earlier build."""
    global _hooked  # audit hooks cannot be removed, so there must be only one
    if not _hooked:
        sys.addaudithook(_on_event)
        _hooked = True
    files: set[str] = set()
    _watchers.append(files)
    try:
        yield files
    finally:
        _watchers.remove(files)
        files.update(f for m in list(sys.modules.values()) if _is_users(f := _source(m)))


def _source(module: Any) -> str:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else ""


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event != "open":
        return
    path, mode, flags = arguments
    reads = "r" in mode if isinstance(mode, str) else not (flags or 0) & (os.O_WRONLY | os.O_RDWR)
    if reads and isinstance(path, str | os.PathLike) and _is_users(full := os.path.abspath(path)):
        for files in _watchers:
            files.add(full)


_NOT_THE_USERS = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(__file__).resolve().parents[1]),
    "/proc/",
    "/dev/",
)


def _is_users(path: str) -> bool:
    """Not Python's, nor an installed package's, nor autopar's."""
    return bool(path) and not path.startswith(_NOT_THE_USERS) and not path.endswith(".pyc")
