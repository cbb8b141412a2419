"""Implementations of ops whose local part is not the plain op on local tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autopar.ir.graph import Operator
from autopar.ir.rule import BoundRule, Split
from autopar.ir.sharding import Mesh
from autopar.runtime.draws import DRAWS, keep_mask
from autopar.runtime.grouped import GROUPED
from autopar.simulator.workspace import attention_samples

ReduceOp = Literal["sum", "max"]


class LocalContext(Protocol):
    """What an implementation may know of its rank and say to the others."""

    @property
    def bound(self) -> BoundRule: ...

    @property
    def split(self) -> Split: ...

    @property
    def mesh(self) -> Mesh: ...

    @property
    def seed(self) -> int:
        """Changes every step; equal on all ranks."""
        ...

    @property
    def operator_id(self) -> int:
        """Equal on all ranks and in every process that runs the plan."""
        ...

    @property
    def divisor(self) -> Tensor | None:
        """What a mean over several microbatches divides by, when it has to be counted."""
        ...

    def axes(self, factor: str) -> tuple[int, ...]:
        """The mesh axes that divide ``factor``."""
        ...

    def offset(self, factor: str) -> int:
        """Where this rank's slice of ``factor`` starts."""
        ...

    def all_reduce(self, tensor: Tensor, axis: int, op: ReduceOp = "sum") -> Tensor:
        """A new tensor, reduced over ``axis``; autograd does not see it."""
        ...


LocalOp = Callable[[LocalContext, Operator, Sequence[Any], Mapping[str, Any]], Any]
"""(context, operator with local arguments, its values) -> local outputs."""


def needs_local_op(bound: BoundRule, split: Split) -> bool:
    """Whether the operator has to be called through ``LOCAL_OPS`` under this split."""
    special = bound.rule.special
    return "*" in special or any(choice in special for choice in split)


def aten(op: str) -> Any:
    """The overload that a name like ``aten.linear.default`` means."""
    found: Any = torch.ops
    for part in op.split("."):
        found = getattr(found, part)
    return found


def _given(
    values: Sequence[Any], keywords: Mapping[str, Any], index: int, keyword: str, default: Any
) -> Any:
    return values[index] if index < len(values) else keywords.get(keyword, default)


def _local_size(context: LocalContext, factor: str) -> int:
    return context.bound.local_sizes(context.split, context.mesh)[factor]


def _reduce(
    context: LocalContext, tensor: Tensor, factors: Sequence[str], op: ReduceOp = "sum"
) -> Tensor:
    """All-reduced over every axis that divides one of ``factors``."""
    for factor in factors:
        for axis in context.axes(factor):
            tensor = context.all_reduce(tensor, axis, op)
    return tensor


# --- means ---------------------------------------------------------------------------------------


def global_mean(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Any:
    """The plain op divides by the local count; a partial sum of the global mean is this share."""
    local = context.bound.local_sizes(context.split, context.mesh)
    share = prod(local[f] / context.bound.sizes[f] for f in context.bound.rule.special)
    return aten(operator.op)(*values, **keywords) * share


# --- embedding -----------------------------------------------------------------------------------


class _VocabularyShard(torch.autograd.Function):
    """Rows that this rank has, zero for tokens that it does not; keeps the tokens only."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, tokens: Tensor, start: int, padding: int, by_frequency: bool
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.start, ctx.rows, ctx.padding = start, table.shape[0], padding
        ctx.by_frequency = by_frequency
        here, rows = _in_shard(tokens, start, table.shape[0])
        return torch.embedding(table, rows).masked_fill_(~here.unsqueeze(-1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (tokens,) = ctx.saved_tensors
        here, rows = _in_shard(tokens, ctx.start, ctx.rows)
        here = here & (tokens != ctx.padding)
        mine = gradient.masked_fill(~here.unsqueeze(-1), 0)
        table = torch.ops.aten.embedding_dense_backward(mine, rows, ctx.rows, -1, ctx.by_frequency)
        return table, None, None, None, None


OUT_OF_RANGE = "index out of range"
"""Begins what is said of such an index; so do torch's own words."""


def _check_range(index: Tensor, size: int, what: str, ignored: int | None = None) -> None:
    """An index that no rank has would count as zero everywhere, where one process raises an error.

    A GPU is not waited for: there it is an assertion of the device, as torch's own is.
    """
    inside = (index >= 0) & (index < size)
    if ignored is not None:
        inside |= index == ignored
    torch._assert_async(inside.all(), f"{OUT_OF_RANGE}: {what} has {size}")


def _in_shard(tokens: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Which tokens lie in rows ``start`` and following, and their row there (0 for the others)."""
    here = (tokens >= start) & (tokens < start + rows)
    return here, (tokens - start).masked_fill_(~here, 0)


def embedding(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    _check_range(values[1], context.bound.sizes["vocab"], f"the table of {operator.name}")
    padding = int(_given(values, keywords, 2, "padding_idx", -1))
    by_frequency = bool(_given(values, keywords, 3, "scale_grad_by_freq", False))
    found: Tensor = _VocabularyShard.apply(  # type: ignore[no-untyped-call]
        values[0], values[1], context.offset("vocab"), padding, by_frequency
    )
    return found


# --- losses over classes -------------------------------------------------------------------------


class _ClassShardEntropy(torch.autograd.Function):
    """Each rank's part of the cross-entropy of every token; the parts sum to the whole.

    With the largest logit and the sum of exponentials known, log-probabilities are local: a rank
    contributes the picked class if it has it, and its classes' share of label smoothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        context: LocalContext,
        dim: int,
        ignored: int,
        smoothing: float,
    ) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = _reduce(context, wide.amax(dim), ["classes"], "max")
        shifted = wide - largest.unsqueeze(dim)
        total = _reduce(context, shifted.exp().sum(dim), ["classes"])
        log_p = (shifted - total.log().unsqueeze(dim)).to(logits.dtype)
        classes = context.bound.sizes["classes"]
        here, picked = _in_shard(target, context.offset("classes"), logits.shape[dim])
        counts = target != ignored
        loss = log_p.gather(dim, picked.unsqueeze(dim)).squeeze(dim).masked_fill(~here, 0)
        loss = -(1 - smoothing) * loss
        saved = [log_p, target]
        if smoothing:
            loss = loss - log_p.sum(dim) * (smoothing / classes)
            saved.append(counts)
        ctx.save_for_backward(*saved)
        ctx.start, ctx.dim, ctx.ignored = context.offset("classes"), dim, ignored
        ctx.smoothing, ctx.classes = smoothing, classes
        return loss.masked_fill(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        log_p, target = ctx.saved_tensors[:2]
        dim = ctx.dim
        gradient = gradient.masked_fill(target == ctx.ignored, 0)
        here, picked = _in_shard(target, ctx.start, log_p.shape[dim])
        logits = log_p.exp()
        if ctx.smoothing:
            logits -= ctx.smoothing / ctx.classes
        hit = here.to(log_p.dtype).mul_(-(1 - ctx.smoothing))
        logits.scatter_add_(dim, picked.unsqueeze(dim), hit.unsqueeze(dim))
        return logits.mul_(gradient.unsqueeze(dim)), None, None, None, None, None


class _ClassShardPick(torch.autograd.Function):
    """Minus the target's log-probability on the rank that has it, zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, log_p: Tensor, target: Tensor, start: int, dim: int, ignored: int
    ) -> Tensor:
        ctx.save_for_backward(target)
        ctx.start, ctx.dim, ctx.ignored, ctx.shape = start, dim, ignored, log_p.shape
        here, picked = _in_shard(target, start, log_p.shape[dim])
        here = here & (target != ignored)
        return -log_p.gather(dim, picked.unsqueeze(dim)).squeeze(dim).masked_fill(~here, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (target,) = ctx.saved_tensors
        here, picked = _in_shard(target, ctx.start, ctx.shape[ctx.dim])
        here = here & (target != ctx.ignored)
        gradient = gradient.masked_fill(~here, 0).neg_().unsqueeze(ctx.dim)
        log_p = gradient.new_zeros(ctx.shape)
        return log_p.scatter_(ctx.dim, picked.unsqueeze(ctx.dim), gradient), None, None, None, None


NONE, MEAN, SUM = range(3)  # how ATen numbers reductions


def _classified(*, normalises: bool) -> LocalOp:
    """Cross-entropy, or the negative log-likelihood of what is normalised already."""

    def loss(
        context: LocalContext,
        operator: Operator,
        values: Sequence[Any],
        keywords: Mapping[str, Any],
    ) -> Any:
        scores, target = values[0], values[1]
        weight = _given(values, keywords, 2, "weight", None)
        how = int(_given(values, keywords, 3, "reduction", MEAN))
        ignored = int(_given(values, keywords, 4, "ignore_index", -100))
        smoothing = (
            float(_given(values, keywords, 5, "label_smoothing", 0.0)) if normalises else 0.0
        )
        dim = min(1, scores.ndim - 1)
        if "classes" in context.split:
            classes = context.bound.sizes["classes"]
            _check_range(target, classes, f"the classes of {operator.name}", ignored)
            each: Tensor = (
                _ClassShardEntropy.apply(scores, target, context, dim, ignored, smoothing)  # type: ignore[no-untyped-call]
                if normalises
                else _ClassShardPick.apply(scores, target, context.offset("classes"), dim, ignored)  # type: ignore[no-untyped-call]
            )
            total = each if how == NONE else each.sum()
        else:
            rest = (SUM if how == MEAN else how, ignored)
            total = aten(operator.op)(
                scores, target, weight, *rest, *([smoothing] if normalises else [])
            )
        if how != MEAN:
            return total
        return total / _count(context, target, weight, ignored, scores).to(total.dtype)

    return loss


def _count(
    context: LocalContext, target: Tensor, weight: Tensor | None, ignored: int, scores: Tensor
) -> Tensor:
    """What a mean divides by: the tokens of the global batch that are not ignored, or their
    weights; all tokens when the target is probabilities."""
    tokens = [f for f in context.bound.rule.sums if f != "classes"]
    if target.is_floating_point():
        return scores.new_tensor(float(prod(context.bound.sizes[f] for f in tokens)))
    if context.divisor is not None:
        return context.divisor
    return _reduce(context, _own_count(target, weight, ignored), tokens)


def _own_count(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    counted = target != ignored
    if weight is not None:
        picked = weight.detach()[target.masked_fill(~counted, 0)]
        return picked.masked_fill(~counted, 0).sum(dtype=torch.float64)
    return counted.sum().to(torch.float64)


def mean_divisor(values: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    """What a mean over classified tokens divides by, given its arguments; the scores, the first of
    them, are not looked at."""
    weight = _given(values, keywords, 2, "weight", None)
    return _own_count(values[1], weight, int(_given(values, keywords, 4, "ignore_index", -100)))


# --- dropout -------------------------------------------------------------------------------------


def dropout(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Any:
    x = values[0]
    p = float(_given(values, keywords, 1, "p", 0.5))
    training = _given(values, keywords, 2, "train", True)
    both = operator.op == "aten.native_dropout.default"
    if p == 0.0 or training is False:
        return (x.clone(), torch.ones_like(x, dtype=torch.bool)) if both else x.clone()
    if p == 1.0:
        return (x * 0.0, torch.zeros_like(x, dtype=torch.bool)) if both else x * 0.0
    keep = keep_mask(context, context.bound.outputs[0], p, x.device)
    out = (x * keep).mul_(1 / (1 - p))
    return (out, keep) if both else out


# --- attention -----------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Attention by its definition; keeps what the fused kernels keep.

    These are the inputs, the output and for each row the logarithm of its sum of exponentials:
    probabilities and dropout mask are made again in the backward. As scores and masks are large, a
    few samples are worked on at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        causal: bool,
        keep: Callable[[slice], Tensor] | None,
        p: float,
    ) -> Tensor:
        out = _laid_out_as_fused(q, v)
        rows = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in _samples(q, k):
            scores = _scores(q[part], k[part], _of(bias, part, q), scale, causal)
            rows[part] = scores.logsumexp(-1)
            weights = _probabilities(scores, rows[part]).to(q.dtype)
            if keep is not None:
                weights.mul_(keep(part)).div_(1 - p)
            out[part] = (_per_key_head(weights, k[part]) @ v[part]).reshape(out[part].shape)
            del scores, weights
        ctx.save_for_backward(q, k, v, bias, out, rows)
        ctx.scale, ctx.causal, ctx.keep, ctx.p = scale, causal, keep, p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, rows = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for part in _samples(q, k):
            _Attention._backward(
                ctx,
                [x[part] for x in (gradient, q, k, v, out, rows)],
                _of(bias, part, q),
                part,
                [dq[part], dk[part], dv[part]],
                _of(dbias, part, q),
            )
        return dq, dk, dv, dbias, None, None, None, None

    @staticmethod
    def _backward(
        ctx: Any,
        given: list[Tensor],
        bias: Tensor | None,
        part: slice,
        wanted: list[Tensor],
        dbias: Tensor | None,
    ) -> None:
        """Of a few samples; writes to ``wanted`` and adds to ``dbias``."""
        gradient, q, k, v, out, rows = given
        scores = _scores(q, k, bias, ctx.scale, ctx.causal)
        weights = _probabilities(scores, rows).to(q.dtype)
        del scores
        grouped = _per_key_head(gradient, k)
        dw = (grouped @ v.transpose(-1, -2)).reshape(weights.shape)
        kept = weights
        if ctx.keep is not None:
            keep = ctx.keep(part)
            kept = (weights * keep).div_(1 - ctx.p)
            dw.mul_(keep).div_(1 - ctx.p)
            del keep
        wanted[2].copy_(_per_key_head(kept, k).transpose(-1, -2) @ grouped)
        del kept
        # the sum over keys of dw x weights is that over v's columns of gradient x output
        ds = dw.sub_((gradient * out).sum(-1, keepdim=True)).mul_(weights)
        del weights
        if dbias is not None:
            dbias += ds.sum_to_size(dbias.shape)
        ds = _per_key_head(ds, k).mul_(ctx.scale)
        wanted[0].copy_((ds @ k).reshape(q.shape))
        wanted[1].copy_(ds.transpose(-1, -2) @ _per_key_head(q, k))


def _laid_out_as_fused(q: Tensor, v: Tensor) -> Tensor:
    """An empty output, laid out so that joining the heads is a view."""
    shape = (*q.shape[:-1], v.shape[-1])
    if q.ndim != 4:
        return q.new_empty(shape)
    samples, heads, queries, width = shape
    return q.new_empty((samples, queries, heads, width)).transpose(1, 2)


def _samples(q: Tensor, k: Tensor) -> list[slice]:
    """The batch in parts that have at most ``LARGEST_SCORES`` scores, or one sample."""
    if q.ndim != 4:
        return [slice(None)]
    count = attention_samples(q.shape[0], prod(q.shape[1:-1]) * k.shape[-2])
    return [slice(start, start + count) for start in range(0, q.shape[0], count)]


def _of(bias: Tensor | None, part: slice, q: Tensor) -> Tensor | None:
    """What a part of the batch has of a bias, which may be the same for all samples."""
    alike = bias is None or bias.ndim < q.ndim or bias.shape[0] == 1
    return bias if alike or bias is None else bias[part]


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = _per_key_head(q * scale, k) @ k.transpose(-1, -2)
    scores = scores.reshape(*q.shape[:-1], k.shape[-2])
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    if causal:
        lower = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~lower, -torch.inf)
    return scores


def _probabilities(scores: Tensor, rows: Tensor) -> Tensor:
    """A row in which everything is masked gets zeros."""
    return (scores - rows.masked_fill(rows == -torch.inf, 0).unsqueeze(-1)).exp_()


def _per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Rows of all query heads of a key head, one below the other."""
    if x.ndim < 3 or x.shape[-3] == k.shape[-3]:
        return x
    return x.reshape(*k.shape[:-2], -1, x.shape[-1])


def attention(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    """The plain op where a fused kernel takes it; else by definition, with the hashed dropout."""
    q, k, v = values[:3]
    bias = _given(values, keywords, 3, "attn_mask", None)
    p = float(_given(values, keywords, 4, "dropout_p", 0.0))
    causal = bool(_given(values, keywords, 5, "is_causal", False))
    scale = _given(values, keywords, 6, "scale", None)
    learned = bias is not None and bias.requires_grad
    if p == 0.0 and not learned and _fused(q, v):
        plain: Tensor = aten(operator.op)(*values, **keywords)
        return plain
    rows, columns = context.bound.inputs[0][:-1], context.bound.inputs[1][-2]

    def keep(part: slice) -> Tensor:
        return keep_mask(context, (*rows, columns), p, q.device, part)

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, bias, scale, causal, keep if p else None, p)  # type: ignore[no-untyped-call]
    return out


def _fused(q: Tensor, v: Tensor) -> bool:
    return q.ndim == 4 and q.shape[-1] == v.shape[-1]


# --- batch norm ----------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    """Normalised with the statistics of the global batch.

    Outputs: normalised, mean, 1 / deviation, variance. Forward all-reduces the mean, then the
    centred squares (their difference would lose digits); backward two sums at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epsilon: float,
        count: int,
        reduce: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = [d for d in range(x.ndim) if d != 1]
        mean = reduce(wide.sum(rows) / count)
        centred = wide - _channels(mean, x)
        variance = reduce(centred.square().sum(rows) / count)
        scale = (variance + epsilon).rsqrt()
        out = centred * _channels(scale, x)
        if weight is not None:
            out = out * _channels(weight, x)
        if bias is not None:
            out = out + _channels(bias, x)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count, ctx.reduce = count, reduce
        ctx.mark_non_differentiable(mean, scale, variance)
        return out.to(x.dtype), mean, scale, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        del unused
        x, weight, mean, scale = ctx.saved_tensors
        wide = gradient.to(mean.dtype)
        rows = [d for d in range(x.ndim) if d != 1]
        normal = (x.to(mean.dtype) - _channels(mean, x)) * _channels(scale, x)
        sums = torch.stack([wide.sum(rows), (wide * normal).sum(rows)])
        means = ctx.reduce(sums) / ctx.count
        factor = scale if weight is None else scale * weight
        dx = wide - _channels(means[0], x) - normal * _channels(means[1], x)
        dx = (dx * _channels(factor, x)).to(x.dtype)
        dbias = sums[0].to(x.dtype) if ctx.needs_input_grad[2] else None
        dweight = sums[1].to(x.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, dbias, None, None, None


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.ndim - 2))


def batch_norm(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    tracked = operator.op == "aten._native_batch_norm_legit_functional.default"
    after = 5 if tracked else 3
    x, weight, bias = values[:3]
    momentum = float(_given(values, keywords, after + 1, "momentum", 0.1))
    epsilon = float(_given(values, keywords, after + 2, "eps", 1e-5))
    rows = context.bound.rule.special
    count = prod(context.bound.sizes[f] for f in rows)

    def reduce(tensor: Tensor) -> Tensor:
        return _reduce(context, tensor, rows)

    out, mean, scale, variance = _BatchNorm.apply(x, weight, bias, epsilon, count, reduce)  # type: ignore[no-untyped-call]
    if not tracked:
        return out, mean, scale
    running_mean, running_variance = values[3:5]
    unbiased = variance * (count / max(count - 1, 1))
    return (
        out,
        mean,
        scale,
        running_mean * (1 - momentum) + (mean * momentum).to(running_mean.dtype),
        running_variance * (1 - momentum) + (unbiased * momentum).to(running_variance.dtype),
    )


# --- counting ------------------------------------------------------------------------------------


def arange(
    context: LocalContext, operator: Operator, values: Sequence[Any], keywords: Mapping[str, Any]
) -> Tensor:
    """Counts from where the slice starts, as torch does: integers in steps without their fraction,
    other numbers in double precision."""
    start = values[0] if operator.op != "aten.arange.default" else 0
    step = values[2] if len(values) > 2 else keywords.get("step", 1)
    dtype = getattr(torch, context.bound.output_specs[0].dtype)
    first, length = context.offset("d0"), _local_size(context, "d0")
    wide, number = (torch.float64, float) if dtype.is_floating_point else (torch.int64, int)
    index = torch.arange(first, first + length, dtype=wide, device=keywords.get("device"))
    counted: Tensor = index * number(step) + number(start)
    return counted.to(dtype)


_MEANS = (
    "aten.mean.default",
    "aten.mean.dim",
    "aten.mse_loss.default",
    "aten.l1_loss.default",
    "aten.smooth_l1_loss.default",
    "aten.huber_loss.default",
    "aten.kl_div.default",
    "aten.soft_margin_loss.default",
    "aten.binary_cross_entropy.default",
    "aten.binary_cross_entropy_with_logits.default",
    "aten.adaptive_avg_pool1d.default",
    "aten.adaptive_avg_pool2d.default",
    "aten.adaptive_avg_pool3d.default",
    "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default",
)

LOCAL_OPS: dict[str, LocalOp] = {
    **dict.fromkeys(_MEANS, global_mean),
    "aten.embedding.default": embedding,
    "aten.cross_entropy_loss.default": _classified(normalises=True),
    "aten.nll_loss.default": _classified(normalises=False),
    "aten.nll_loss_nd.default": _classified(normalises=False),
    "aten.nll_loss2d.default": _classified(normalises=False),
    **DRAWS,
    **GROUPED,
    "aten.native_dropout.default": dropout,
    "aten.dropout.default": dropout,
    "aten.scaled_dot_product_attention.default": attention,
    "aten._native_batch_norm_legit_functional.default": batch_norm,
    "aten._native_batch_norm_legit.no_stats": batch_norm,
    "aten.arange.default": arange,
    "aten.arange.start": arange,
    "aten.arange.start_step": arange,
}
"""By op: what is called where ``needs_local_op`` says so."""
