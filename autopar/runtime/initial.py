"""Initial values of a module's parameters, one whole tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from autopar.errors import AutoparError

LARGE_ELEMENTS = 1 << 16
"""Smaller tensors are simply made: a quarter of a megabyte is no burden, and code that looks at
its own tensors (``.item()``) mostly looks at small ones."""

_FACTORIES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
    torch.ops.aten.zeros.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.full.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.rand.default,
    torch.ops.aten.randn.default,
    torch.ops.aten.arange.default,
    torch.ops.aten.eye.default,
    torch.ops.aten.eye.m,
}
_OVERWRITES = {
    "normal_",
    "uniform_",
    "fill_",
    "zero_",
    "copy_",
    "random_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
}
"""In-place ops whose result does not depend on what was there."""

_LOOKS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True)
class _Call:
    """An op that made or changed large tensors, with the generator's state before a random one."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: tuple[Tensor, ...]
    written: tuple[int, ...]
    read: tuple[int, ...]
    overwrites: bool
    generator: Tensor | None


@dataclass
class InitialValues:
    """What ``whole`` needs to compute any tensor of a module that was made under ``making``."""

    large_elements: int = LARGE_ELEMENTS
    calls: list[_Call] = field(default_factory=list)
    writers: dict[int, list[int]] = field(default_factory=dict)
    fake: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def make(self, function: Callable[[], nn.Module], seed: int) -> nn.Module:
        """The module of ``torch.manual_seed(seed); function()``, its large tensors without memory.

        Every random number is drawn in the original order, into one temporary tensor at a time.
        """
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _Making(self):
            # copy.deepcopy asks a tensor for its address before it copies the right way
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            torch.manual_seed(seed)
            try:
                return function()
            except _LOOKS as error:
                raise AutoparError(
                    "the model looks at its own weights while it makes them, so they cannot be "
                    f"made shard by shard ({error}); give the model itself instead of the function "
                    "that makes it, at the price of one whole copy on every rank"
                ) from error

    def whole(self, tensor: Tensor) -> Tensor:
        """The value of ``tensor``, computed anew; the caller drops it when done."""
        if not isinstance(tensor, FakeTensor):
            return tensor.detach()
        memory: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for index in sorted(self._needed(_storage(tensor), len(self.calls))):
                self._replay(self.calls[index], memory)
        return _on(memory[_storage(tensor)], tensor)

    def _needed(self, storage: int, before: int) -> set[int]:
        """Calls that the content of ``storage`` depends on, of those before a given one."""
        found: set[int] = set()
        waiting = [(storage, before)]
        while waiting:
            wanted, end = waiting.pop()
            for index in reversed(self.writers.get(wanted, [])):
                if index >= end:
                    continue
                if index not in found:
                    found.add(index)
                    waiting += [(read, index) for read in self.calls[index].read]
                if self.calls[index].overwrites:
                    break
        return found | {self.writers[storage][0]}

    def _replay(self, call: _Call, memory: dict[int, torch.UntypedStorage]) -> None:
        for tensor in (*_fakes(call.args), *_fakes(call.kwargs)):
            key = _storage(tensor)
            if key not in memory:
                size = tensor.untyped_storage().nbytes()
                memory[key] = torch.empty(size, dtype=torch.uint8).untyped_storage()
        args, kwargs = tree_map_only(
            FakeTensor, lambda t: _on(memory[_storage(t)], t), (call.args, call.kwargs)
        )
        if call.generator is not None:
            torch.set_rng_state(call.generator)
        results = [r for r in tree_flatten(call.op(*args, **kwargs))[0] if isinstance(r, Tensor)]
        for made, result in zip(call.made, results, strict=False):
            memory[_storage(made)] = _like(result, made).untyped_storage()

    def note(self, call: _Call) -> None:
        for storage in call.written:
            self.writers.setdefault(storage, []).append(len(self.calls))
        self.calls.append(call)


class _Making(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, values: InitialValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (*_fakes(args), *_fakes(kwargs))
        if not given:
            return (
                self._factory(func, args, kwargs) if func in _FACTORIES else func(*args, **kwargs)
            )
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(self.values.whole(args[0]))
        return self._noted(func, args, kwargs, given)

    def _factory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.values.fake:
            trial = func(*args, **kwargs)
        if trial.numel() < self.values.large_elements or trial.device.type != "cpu":
            return func(*args, **kwargs)
        return self._noted(func, args, kwargs, (), trial)

    def _noted(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: tuple[Tensor, ...],
        result: Any = None,
    ) -> Any:
        before = {_storage(tensor) for tensor in given}
        if result is None:
            with self.values.fake:
                result = func(*args, **kwargs)
        results = [r for r in tree_flatten(result)[0] if isinstance(r, Tensor)]
        made = tuple(r for r in results if _storage(r) not in before)
        changed = tuple(
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if isinstance(value, FakeTensor) and argument.is_write
        )
        if not made and not changed:
            return result  # a view
        generator = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = torch.get_rng_state()
            self._draw(func, args, kwargs, changed)
        written = (*map(_storage, made), *map(_storage, changed))
        overwrites = not changed or (
            func._schema.name.split("::")[1] in _OVERWRITES and _covers(changed[0])
        )
        read = tuple(before - set(written)) if overwrites else tuple(before)
        args, kwargs = tree_map_only(Tensor, _kept, (args, kwargs))
        self.values.note(_Call(func, args, kwargs, made, written, read, overwrites, generator))
        return result

    def _draw(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changed: tuple[Tensor, ...]
    ) -> None:
        """Take from the generator what the op takes."""

        def stand_in(tensor: Tensor) -> Tensor:
            if any(tensor is one for one in changed):
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            return self.values.whole(tensor)

        args, kwargs = tree_map_only(FakeTensor, stand_in, (args, kwargs))
        func(*args, **kwargs)


def _fakes(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, FakeTensor))


def _kept(tensor: Tensor) -> Tensor:
    """An argument to call with again: detached, and small ones safe from later changes."""
    return tensor.detach() if isinstance(tensor, FakeTensor) else tensor.detach().clone()


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _covers(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _on(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """The real tensor that lies on ``storage`` as the fake one does on its own."""
    empty = torch.empty(0, dtype=like.dtype)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())


def _like(result: Tensor, made: Tensor) -> Tensor:
    if result.stride() == made.stride() and result.storage_offset() == made.storage_offset():
        return result
    return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype).copy_(result)
