"""``load``: what a person writes on the command line becomes a model, a batch and a loss."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from autopar.errors import AutoparError
from autopar.extractor.interpreter import is_known
from autopar.extractor.trace import Inputs, Loss, checked, extract
from autopar.ir.graph import OperatorGraph

FORMS = "a path to model.py, package.module:callable, or hf:PATH_OR_NAME"

_T = TypeVar("_T")

Built = tuple[nn.Module, Inputs, Loss | None]


@dataclass(frozen=True)
class LoadedModel:
    """A model that can be built again.

    ``model`` and ``inputs`` are on the meta device where their code allows it, so that nothing is
    allocated; ``materialise`` makes them for real.
    """

    spec: str
    name: str
    model: nn.Module
    inputs: Inputs
    loss: Loss | None
    build: Callable[[], Built]

    def materialise(self, seed: int = 0) -> Built:
        """Real weights and a real batch on the CPU, the same for the same ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def extract(self, precision: Literal["full", "mixed"] = "full") -> OperatorGraph:
        return extract(self.model, self.inputs, self.loss, name=self.name, precision=precision)


def load(spec: str, *, batch: int | None = None, sequence: int | None = None) -> LoadedModel:
    """Find and build a model.

    - ``path/to/model.py`` with ``model()``, ``inputs()`` and optionally ``loss(outputs, inputs)``;
    - ``package.module:callable`` that returns ``(model, inputs)`` or ``(model, inputs, loss)``;
    - ``hf:PATH_OR_NAME``, a config.json (or its directory) or a name in the local cache of
      Hugging Face; ``batch`` and ``sequence`` are the sizes of its batch.

    Raises:
        AutoparError: there is no such model, its code fails, or returns something else.
    """
    if spec.startswith("hf:"):
        from_config = importlib.import_module("autopar.extractor.huggingface").builder
        name, build = from_config(spec.removeprefix("hf:"), batch, sequence)
    elif batch is not None or sequence is not None:
        raise AutoparError(f"batch and sequence are for hf: models; {spec!r} has inputs of its own")
    elif spec.endswith(".py") or Path(spec).is_file():
        name, build = _from_file(Path(spec))
    elif ":" in spec:
        name, build = _from_import(spec)
    else:
        hint = _directory_hint(Path(spec))
        raise AutoparError(f"there is no model {spec!r}: give {FORMS}{hint}")
    model, inputs, loss = _on_meta(build)
    return LoadedModel(spec, name, model, inputs, loss, build)


def know_ops(graph: OperatorGraph, spec: str, batch: int | None, sequence: int | None) -> None:
    """Have custom ops of the model's code registered, which a graph from the cache has not run."""
    unknown = sorted({o.op for o in graph.operators if not is_known(o.op)})
    if unknown and spec:
        load(spec, batch=batch, sequence=sequence)
        unknown = [op for op in unknown if not is_known(op)]
    if unknown:
        raise AutoparError(
            f"the custom ops {', '.join(unknown)} are not registered in this process: "
            + (f"{spec} does not define them any more" if spec else "import what defines them")
        )


def _on_meta(build: Callable[[], _T]) -> _T:
    """Without allocating; for real only where the code needs the values of tensors."""
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        if "meta" not in str(error):  # not what torch says of tensors without values
            raise
    with torch.device("cpu"):
        return build()


def _directory_hint(path: Path) -> str:
    if (path / "config.json").is_file():
        return f". Did you mean hf:{path}?"
    if (path / "model.py").is_file():
        return f". Did you mean {path / 'model.py'}?"
    around = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [p.name for p in around.glob("*.py")], 1, 0.5)
    return f". Did you mean {around / near[0]}?" if near else ""


def _from_file(path: Path) -> tuple[str, Callable[[], Built]]:
    if not path.is_file():
        raise AutoparError(f"there is no file {str(path)!r}{_directory_hint(path)}")
    module = _run_file(path.resolve())
    makers: dict[str, Any] = {
        name: getattr(module, name, None) for name in ("model", "inputs", "loss")
    }
    missing = [f"{name}()" for name in ("model", "inputs") if not callable(makers[name])]
    if missing:
        defined = [n for n, v in vars(module).items() if callable(v) and _is_own(v, module)]
        raise AutoparError(
            f"{path} has no {' and no '.join(missing)}. It must define model() -> nn.Module and "
            f"inputs() -> a tuple or dict of tensors, one global batch; it defines "
            f"{', '.join(defined) or 'no functions'}."
        )
    if makers["loss"] is not None and not callable(makers["loss"]):
        raise AutoparError(f"{path}: loss must be a function loss(outputs, inputs)")

    def build() -> Built:
        hollow = torch.get_default_device().type == "meta"
        part = _on_meta if hollow else lambda make: make()
        with _importing_from(path.resolve().parent), _user_code(str(path)):
            inputs = part(makers["inputs"])  # first: a mistake here costs no model
            model = part(makers["model"])
        return _checked_build(str(path), (model, inputs, makers["loss"]))

    return path.stem if path.stem != "model" else path.resolve().parent.name, build


def _is_own(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _run_file(path: Path) -> ModuleType:
    name = f"autopar_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=None)
    if spec is None or spec.loader is None:
        raise AutoparError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    with _importing_from(path.parent), _user_code(str(path)):
        spec.loader.exec_module(module)
    return module


def _from_import(spec: str) -> tuple[str, Callable[[], Built]]:
    path, _, attribute = spec.partition(":")
    with _importing_from(Path.cwd()), _user_code(spec):
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name and (path == error.name or path.startswith(error.name + ".")):
                raise AutoparError(
                    f"there is no module {error.name!r} for {spec!r}; it must be installed or "
                    f"importable from {Path.cwd()}. A model is {FORMS}"
                ) from error
            raise
    maker: Any = module
    for part in attribute.split("."):
        found = getattr(maker, part, None)
        if found is None:
            names = [n for n in dir(maker) if not n.startswith("_")]
            near = difflib.get_close_matches(part, names, 1)
            hint = f" Did you mean {path}:{near[0]}?" if near else f" It has {', '.join(names)}."
            raise AutoparError(f"{path} has no {part!r}.{hint}")
        maker = found
    if not callable(maker):
        raise AutoparError(f"{spec} is a {type(maker).__name__}; it must be a function")

    def build() -> Built:
        with _importing_from(Path.cwd()), _user_code(spec):
            made = maker()
        return _checked_build(spec, made)

    return attribute, build


def _checked_build(spec: str, made: Any) -> Built:
    wanted = "(model, inputs) or (model, inputs, loss)"
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise AutoparError(f"{spec} must return {wanted}, not a {type(made).__name__}")
    model, inputs, loss = (*made, None)[:3]
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(f"the model is a {type(model).__name__}, not an nn.Module")
    if loss is not None and not callable(loss):
        problems.append(f"the loss is a {type(loss).__name__}, not a function")
    try:
        inputs = checked(inputs)
    except AutoparError as error:
        problems.append(str(error))
    if problems:
        raise AutoparError(f"{spec}: {'; '.join(problems)}")
    return model, inputs, loss


@contextmanager
def _importing_from(directory: Path) -> Iterator[None]:
    """``directory`` first on the import path, as when Python runs a file in it."""
    entry = str(directory)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


@contextmanager
def _user_code(spec: str) -> Iterator[None]:
    """What the user's code raises, with its file and line; what it prints is no result of ours."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except AutoparError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        else:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_user_frame(f)]
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else spec
        raise AutoparError(f"{spec} failed at {place}: {type(error).__name__}: {error}") from error


def _is_user_frame(frame: traceback.FrameSummary) -> bool:
    installed = ("site-packages" in frame.filename) or frame.filename.startswith("<")
    return not installed and frame.filename != __file__
