"""``extract``: what the user gives is checked, traced by torch.export and handed to ``convert``."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_buffer_registration_hook

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.extractor.blame import blame
from autopar.extractor.convert import convert
from autopar.ir.graph import OperatorGraph

Inputs = tuple[torch.Tensor, ...] | dict[str, Any]
Loss = Callable[[Any, Any], torch.Tensor]


def extract(
    model: nn.Module,
    inputs: Inputs,
    loss: Loss | None = None,
    *,
    name: str = "model",
    precision: Literal["full", "mixed"] = "full",
) -> OperatorGraph:
    """The forward pass of one global batch, up to the scalar loss, as operators.

    Nothing is computed and no weights are copied, whether ``model`` is real or on the meta
    device. ``inputs`` are the positional (tuple) or keyword (dict) arguments of the model; only
    their shapes and dtypes matter. Without ``loss(outputs, inputs)`` the model returns a scalar,
    or something whose ``.loss`` is one. ``precision="mixed"``: weights, buffers and floating
    inputs as bfloat16. Parameters and buffers that the loss does not depend on are left out.

    Raises:
        UnsupportedModelError: the model cannot be traced, or has what a graph cannot express.
        AutoparError: the inputs or what the model returns have the wrong form.
    """
    inputs = _on_device(checked(inputs), _device(model))
    if precision == "mixed":
        model, inputs = in_bfloat16(model), _cast(inputs)
    with _grouped_shapes():
        seen = _seen_where_it_is(model, inputs, loss)
        if seen is None:
            with FakeTensorMode(allow_non_fake_inputs=True):
                model, inputs = _on_hollow_cpu(model), _on_device(inputs, torch.device("cpu"))
                seen = _seen(model, inputs, loss)
        program, problems = seen
        return convert(program, model, _names(model, inputs), name, problems)


_MET = "found at least two devices, meta"
"""What torch says when a tensor of a model on the meta device meets another."""

_LIFTED = "lifted_tensor"
"""In the names of constants that the trace has met in forward, and not in the module."""

Seen = tuple[ExportedProgram, list[str]]


def _seen_where_it_is(model: nn.Module, inputs: Inputs, loss: Loss | None) -> Seen | None:
    """``None``: forward makes tensors without saying where, on the CPU, where the model is not; or
    numbers become tensors on the meta device, which has no values."""
    try:
        program, problems = _seen(model, inputs, loss)
    except UnsupportedModelError as error:
        if _MET not in str(error):
            raise
        return None
    made = [c for name, c in program.constants.items() if _LIFTED in name]
    return None if any(c.is_meta and c.numel() for c in made) else (program, problems)


def _seen(model: nn.Module, inputs: Inputs, loss: Loss | None) -> Seen:
    with _unseen(model) as problems:
        return _trace(_Step(model, loss), inputs), problems


class _Step(nn.Module):
    """The model and its loss as one module; its only child is what ``convert.PREFIX`` names."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        outputs = self.model(*args, **kwargs)
        if self.loss is not None:
            value, origin = self.loss(outputs, kwargs or args), "loss(outputs, inputs)"
        else:
            value, origin = getattr(outputs, "loss", outputs), "the model"
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = (
                f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value)
            )
            raise AutoparError(
                f"{origin} must return a scalar tensor to differentiate, not {found}. "
                "Give a loss(outputs, inputs) function, or labels if the model makes its own loss."
            )
        return value.reshape(()) if value.dim() else value


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def checked(inputs: Any) -> Inputs:
    """The inputs in one of the two forms; a lone tensor is a tuple of one."""
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if not isinstance(inputs, tuple | dict):
        raise AutoparError(
            f"the inputs are a {type(inputs).__name__}; give a tuple of tensors (positional "
            "arguments of the model) or a dict of tensors (keyword arguments)"
        )
    named = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    wrong = [
        f"{key!r} is a {type(value).__name__}"
        for key, value in named
        if not isinstance(value, torch.Tensor)
        and not (isinstance(inputs, dict) and isinstance(value, bool | int | float | str | None))
    ]
    if wrong:
        raise AutoparError(
            f"inputs must be tensors, without nesting: {', '.join(wrong)}; give each tensor as an "
            "argument of its own, and what is no tensor (a number, a string, None) by its keyword, "
            "in a dict"
        )
    return inputs


def _on_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Fresh tensors of these shapes: the trace takes one tensor given twice for one input."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_like(value, device=device, requires_grad=False)

    if isinstance(inputs, dict):
        return {key: fresh(value) for key, value in inputs.items()}
    return tuple(map(fresh, inputs))


def _cast(inputs: Inputs) -> Inputs:
    def narrow(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(torch.bfloat16) if floating else value

    if isinstance(inputs, dict):
        return {key: narrow(value) for key, value in inputs.items()}
    return tuple(map(narrow, inputs))


def in_bfloat16(model: nn.Module) -> nn.Module:
    """A copy with uninitialised bfloat16 weights and buffers; ``model`` stays as it is."""

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, dtype=dtype, requires_grad=False)

    return _with_tensors(model, narrow)


def _on_hollow_cpu(model: nn.Module) -> nn.Module:
    """A copy whose weights say that they are on the CPU; under ``FakeTensorMode`` they are not."""
    return _with_tensors(
        model, lambda tensor: torch.empty_like(tensor, device="cpu", requires_grad=False)
    )


def _with_tensors(model: nn.Module, made: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy with other weights and buffers."""
    copies: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        copy = made(tensor)
        if isinstance(tensor, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=tensor.requires_grad)
        copies[id(tensor)] = copy
    return deepcopy(model, copies)


def _names(model: nn.Module, inputs: Inputs) -> list[tuple[str, str]]:
    """(name, keyword or "") of each input tensor, as the signature of ``forward`` calls it."""
    if isinstance(inputs, dict):
        return [(key, key) for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    parameters = list(inspect.signature(model.forward).parameters.values())
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    names += [f"input_{i}" for i in range(len(names), len(inputs))]
    return [(name, "") for name in names[: len(inputs)]]


def _trace(step: _Step, inputs: Inputs) -> ExportedProgram:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    given = [name for name, _ in _names(step.model, inputs)]
    with (
        _quiet(),
        _plain_masks(given),
        _static_experts(),
        patch.object(fx.config, "do_not_emit_stack_traces", True),
    ):
        try:
            return torch.export.export(step, args, kwargs, strict=False)
        except AutoparError:
            raise
        except Exception as error:
            raise UnsupportedModelError(blame(error, step.model)) from error


@contextmanager
def _unseen(model: nn.Module) -> Iterator[list[str]]:
    """Collects what a model does that its operators do not show."""
    problems = [
        f"backward hooks on module {path!r}: do what they do in forward"
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    problems += [
        f"gradient hooks on {name!r}: do what they do to the gradients after the backward"
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks
    ]
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch.") and torch.is_grad_enabled():
            problems.append(
                f"torch.autograd.Function {cls.__module__}.{cls.__qualname__}: its backward is not "
                "in the graph; write it with operators that have the gradient you want"
            )
        return original(cls, *args, **kwargs)

    paths = {id(module): path for path, module in model.named_modules()}

    def on_buffer(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in paths and module._buffers.get(name) is not value:
            problems.append(
                f"buffer {name!r} of module {paths[id(module)]!r} is replaced in forward: write to "
                f"it in place, self.{name}.copy_(...)"
            )

    hook = register_module_buffer_registration_hook(on_buffer)
    try:
        with patch.object(torch.autograd.Function, "apply", classmethod(apply)):
            yield problems
    finally:
        hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about itself, and without its logs and prints of errors that
    ``blame`` explains."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            patch("torch.export._trace.print", lambda *_, **__: None, create=True),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _plain_masks(given: list[str]) -> Iterator[None]:
    """Transformers builds the attention masks of a run, not those of an export for inference.

    Under export it never uses ``is_causal`` and always looks for packed sequences, which makes an
    explicit batch x length x length mask. In a run it looks at the positions, which without a
    ``position_ids`` input are those of one unpacked sequence.
    """
    masks = sys.modules.get("transformers.masking_utils")
    if masks is None or "position_ids" in given:
        yield
        return
    with (
        patch.object(masks, "is_torchdynamo_exporting", lambda: False, create=True),
        patch.object(masks, "find_packed_sequence_indices", lambda _: None, create=True),
    ):
        yield


_EXPERTS = ("eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")
"""Transformers' names of ways to do the same: rows times the matrices of their experts."""


@contextmanager
def _static_experts() -> Iterator[None]:
    """Transformers' experts are seen as products of each row with the matrices that it asks for.

    That says what they compute, whatever way was chosen: "eager" loops over the rows that each
    expert happens to have, and the grouped ways sort the rows of the whole batch, which would tie
    all samples together. The program then does its own rows in groups.
    """
    moe = sys.modules.get("transformers.integrations.moe")
    if moe is None:
        yield
        return
    chosen = moe.ExpertsInterface.get_interface

    def get_interface(self: Any, implementation: str, default: Any) -> Any:
        if implementation in _EXPERTS:
            return moe.batched_mm_experts_forward
        return chosen(self, implementation, default)

    with patch.object(moe.ExpertsInterface, "get_interface", get_interface):
        yield


@contextmanager
def _grouped_shapes() -> Iterator[None]:
    """Grouped products of any dtype: torch knows the shape of those of bfloat16 only, with rows
    that begin at 16 bytes, and multiplies others too (2.13)."""
    meta: Any = torch._meta_registrations
    check: Any = torch._check
    known = meta._meta_grouped_mm_common

    def common(a: Any, b: Any, scale_a: Any, scale_b: Any, *rest: Any, **named: Any) -> Any:
        if scale_a is not None:
            return known(a, b, scale_a, scale_b, *rest, **named)
        offs, out_dtype = named.get("offs"), named.get("out_dtype")
        check(
            a.dim() == b.dim() == 2 or a.size(-1) == b.size(-2),
            lambda: "contraction dimension of mat_a and mat_b must match",
        )
        return meta._create_grouped_mm_output_tensor(a, b, offs, out_dtype)

    with patch.object(meta, "_meta_grouped_mm_common", common):
        yield
