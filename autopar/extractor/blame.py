"""What to tell a person whose model cannot be traced: the module, the line, and what to do."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_AUTOPAR = str(Path(__file__).parents[1])

_ADVICE = (
    (
        (
            "data-dependent",
            "GuardOnDataDependent",
            "Cannot call bool() on a",
            ".item()",
            "aten._local_scalar_dense",
            "DynamicOutputShape",
        ),
        "The program depends on the values of tensors (an if, a loop or a size that needs them). "
        "Rewrite it with torch.where or masking, or with fixed sizes: tokens of experts, for "
        "instance, with torch.bmm(rows.unsqueeze(1), weight[expert_of_row]), which is run in "
        "groups, without copies of the weights, or with torch.nn.functional.grouped_mm.",
    ),
    (
        ("meta tensor", "on meta device", "device meta"),
        "An operation needs the values of a tensor that has only a shape. Keep such values in "
        "Python numbers or registered buffers.",
    ),
    (
        ("must match", "must have same", "mismatch", "shape", "size", "missing", "unexpected"),
        "If model(*inputs) fails in the same way, the model and the inputs do not fit together.",
    ),
)


def blame(error: BaseException, model: nn.Module) -> str:
    """Where in the user's code tracing stopped, why, and what to do."""
    text = str(error).strip()
    first_line = text.splitlines()[0] if text else ""
    place = _place(error.__traceback__, model)
    advice = next(
        (advice for words, advice in _ADVICE if any(w in text or w in repr(error) for w in words)),
        "Check that the model runs on these inputs; what torch.export cannot trace, autopar "
        "cannot plan.",
    )
    return f"the model cannot be traced{place}: {type(error).__name__}: {first_line}\n{advice}"


def _place(trace: TracebackType | None, model: nn.Module) -> str:
    """The innermost module of ``model`` that was running, and the last line outside torch."""
    paths = {id(module): path for path, module in model.named_modules()}
    line, module = "", ""
    for frame, number in traceback.walk_tb(trace):
        running = paths.get(id(frame.f_locals.get("self")))
        if running is not None:
            module = f" in module {running!r}" if running else " in the model itself"
        filename = frame.f_code.co_filename
        if not filename.startswith((_TORCH, _AUTOPAR, "<")):
            line = f" at {filename}:{number}"
    return module + line
