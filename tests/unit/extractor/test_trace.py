"""What a graph says about parameters, buffers, constants, names and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.extractor import execute, extract
from autopar.ir.graph import Role
from autopar.ops import bound_rules
from autopar.ops.draws import draws


class Mixed(nn.Module):
    """A detached branch, a no_grad branch, a frozen and an unused weight, a constant, a buffer."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.used = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.used(x).tanh()
        y = self.used(x) * self.scale + self.frozen(x) + torch.tensor([1.0, 2.0]).repeat(4)
        y = y - self.used(x).detach()
        if self.writes:
            self.count += 1
            y += 1
            y[:, 2:4].mul_(2)
        return (y - target).pow(2).mean()


@pytest.mark.parametrize("writes", [False, True])
def test_gradients_stop_where_the_model_stops_them(writes: bool) -> None:
    torch.manual_seed(0)
    model, x = Mixed(writes), torch.randn(4, 8)
    graph = extract(model, (x,))
    model(x).backward()
    expected = [p.grad.clone() for p in model.used.parameters()]
    model.zero_grad()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    environment: dict[str, Tensor] = {}
    loss = execute(graph, state, (x,), environment=environment)
    for tensor in environment.values():
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
    loss.backward()
    for parameter, gradient in zip(model.used.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    for tensor in graph.tensors:
        found = environment[tensor.name]
        received = found.requires_grad and found.grad is not None
        assert received == tensor.differentiable, tensor
    assert model.count.item() == 2 * writes
    assert {t.name: t.differentiable for t in graph.parameters} == {
        "used.weight": True,
        "used.bias": True,
        "frozen.weight": False,
        "frozen.bias": False,
    }
    assert [t.name for t in graph.of_role(Role.BUFFER)] == ["scale", "count"][: 1 + writes]
    assert [value for _, value in graph.constants] == [(1.0, 2.0)]


def test_operators_are_named_for_the_module_that_calls_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    graph = extract(model, (torch.zeros(2, 4),), lambda out, _: out.sum())
    assert [o.name for o in graph.operators] == ["0.linear", "1.0.linear", "1.1.relu", "sum"]
    assert [o.module for o in graph.operators] == ["0", "1.0", "1.1", ""]


def test_the_meta_device_gives_the_same_graph_as_real_weights() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 2))

    with torch.device("meta"):
        hollow = build()

    def loss(out: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return (out - inputs[0][:, :2]).abs().mean()

    x = torch.zeros(6, 4)
    assert extract(hollow, (x,), loss) == extract(build(), (x,), loss)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a * self.weight - b).sum()

    same = torch.ones(2, 4)
    graph = extract(Both(), (same, same))
    assert graph.inputs == ("a", "b")
    assert graph.operators[0].inputs == ("a", "weight")
    assert "b" in graph.operators[1].inputs


def test_an_input_that_is_not_read_keeps_its_place() -> None:
    class Second(nn.Linear):
        def forward(self, unread: Tensor, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    graph = extract(Second(4, 4), {"x": torch.ones(2, 4), "unread": torch.ones(3)})
    assert dict(zip(graph.input_keys, graph.inputs, strict=True)) == {"x": "x", "unread": "unread"}
    assert "unread" in graph.by_name


def test_an_input_may_have_the_name_of_a_weight() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, weight: Tensor) -> Tensor:
            return (weight * self.weight).sum()

    graph = extract(Weighted(), {"weight": torch.ones(2, 4)})
    assert graph.input_keys == ("weight",)
    assert graph.inputs[0] != "weight"
    model = Weighted()
    assert execute(graph, dict(model.named_parameters()), {"weight": torch.ones(2, 4)}) == 8


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate(x).sum() > 0:
            return x
        return -x


def test_an_if_on_values_is_refused_with_module_line_and_advice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching())
    with pytest.raises(UnsupportedModelError) as refused:
        extract(model, (torch.ones(2, 4),), lambda out, _: out.sum())
    message = str(refused.value)
    assert refused.value.exit_code == 4
    assert "module '1'" in message
    line = Branching.forward.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in message
    assert "torch.where" in message


def test_everything_that_a_graph_cannot_express_is_listed_at_once() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight)[x > 0].sum() + self.weight[x[0].nonzero()[:, 0]].sum()

    with pytest.raises(UnsupportedModelError) as refused:
        extract(nn.Sequential(Ragged()), (torch.ones(2, 4),))
    message = str(refused.value)
    assert message.count("module '0'") >= 2, message
    assert "masking" in message


def test_a_model_without_a_scalar_loss_is_told_how_to_give_one() -> None:
    with pytest.raises(AutoparError, match=r"the model must return a scalar.*\(2, 4\).*loss"):
        extract(nn.Linear(4, 4), (torch.ones(2, 4),))


def test_a_loss_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to plan"):
        extract(nn.Linear(4, 4).requires_grad_(False), (torch.ones(2, 4),), lambda y, _: y.sum())


def test_inputs_that_do_not_fit_name_the_line_that_failed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"module '0'.*\n.*do not fit together"):
        extract(nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 5),), lambda y, _: y.sum())


def test_nested_inputs_are_refused_by_name() -> None:
    with pytest.raises(AutoparError, match="'pair' is a list"):
        extract(nn.Linear(4, 4), {"pair": [torch.ones(1), torch.ones(1)]})


def test_a_number_among_keyword_inputs_is_burnt_in() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return (super().forward(x) * by).sum()

    graph = extract(Scaled(4, 4), {"x": torch.ones(2, 4), "by": 3.0})
    assert graph.inputs == ("x",)
    assert any(3.0 in o.arguments for o in graph.operators)


def test_a_constant_without_a_value_says_what_to_do() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.table = torch.ones(4)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight * self.table).sum()

    with torch.device("meta"):
        model = Hidden()
    with pytest.raises(UnsupportedModelError, match=r"'table'.*register it as a buffer"):
        extract(model, (torch.ones(2, 4),))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


def test_what_operators_do_not_show_is_refused() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.linear.weight.register_hook(lambda gradient: gradient * 2)
            self.linear.register_full_backward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            y = Doubled.apply(self.linear(x))
            self.mean = y.detach().mean(0)
            return (y - self.mean).sum()

    with pytest.raises(UnsupportedModelError) as refused:
        extract(nn.Sequential(Sly()), (torch.ones(2, 4),))
    message = str(refused.value)
    assert "Doubled: its backward is not in the graph" in message
    assert "gradient hooks on '0.linear.weight'" in message
    assert "backward hooks on module '0.linear'" in message
    assert "buffer 'mean' of module '0' is replaced in forward" in message


def test_a_write_to_part_of_a_tensor_has_its_gradient() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).clone()
            y[:, :4] = self.b(x)[:, 4:]
            y[:, 7] = 0.5
            return y.pow(2).mean()

    model, x = Writes(), torch.randn(4, 8)
    graph = extract(model, (x,))
    names = list(dict(model.named_parameters()))
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    loss = execute(graph, dict(model.named_parameters()), (x,))
    found = torch.autograd.grad(loss, list(model.parameters()))
    for name, a, b in zip(names, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)


class _Composite(nn.Module):
    """Ops that torch makes of others, one of which is made of others itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)
        self.slope = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.cell(x)
        near = torch.cosine_similarity(hidden, x).type_as(x).mean()
        return near + F.triplet_margin_loss(self.slope(hidden), x, x.flip(0))


def test_composite_ops_without_a_rule_are_what_torch_makes_them_of() -> None:
    torch.manual_seed(0)
    model, x = _Composite().double(), torch.randn(4, 8, dtype=torch.float64)
    graph = extract(model, (x,))
    bound_rules(graph)
    assert not {"aten.lstm_cell.input", "aten.cosine_similarity.default"} & {
        operator.op for operator in graph.operators
    }
    expected = model(x)
    loss = execute(graph, dict(model.named_parameters()), (x,))
    assert_close(loss, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_ops_that_leave_memory_as_it_is_have_a_value_on_every_rank() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            both = y.new_empty(4, 8)
            both[:, :4] = y[:, 4:]
            both[:, 4:] = y[:, :4]
            return (both - x).square().sum()

    graph = extract(Halves(), (torch.randn(4, 8),))
    assert not [operator.op for operator in graph.operators if "empty" in operator.op]
    bound_rules(graph)


class _Contractions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        chain = torch.einsum("...i,ij,jk,bt->...k", x, self.first, self.second, gate)
        gated = torch.einsum("bti,ij,bt->tj", x, self.first, gate)
        turned = torch.einsum("...ti->...it", x)
        implied = torch.einsum("...i,ij", x, self.first)
        return chain.sin().sum() + gated.cos().sum() + (turned.exp() * turned).sum() + implied.sum()


def test_an_einsum_of_many_tensors_or_with_an_ellipsis_is_products_of_two() -> None:
    torch.manual_seed(0)
    model = _Contractions().double()
    inputs = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    graph = extract(model, inputs)
    bound_rules(graph)
    assert all(len(o.inputs) <= 2 for o in graph.operators if o.op == "aten.einsum.default")
    expected = model(*inputs)
    loss = execute(graph, dict(model.named_parameters()), inputs)
    assert_close(loss, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert_close(found, wanted, rtol=1e-12, atol=1e-15)


class _SaysNoDevice(nn.Module):
    """Makes positions, a mask and a table in forward without saying on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 4), nn.Embedding(8, 4)
        self.head = self.tokens  # tied
        self.register_buffer("scale", torch.ones(4))

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.places(torch.arange(length)) * self.scale
        later = torch.ones(length, length).triu(1).bool()
        scores = (x @ x.mT).masked_fill(later, float("-inf")).softmax(-1)
        x = scores @ x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return F.cross_entropy((x @ self.head.weight.t()).flatten(0, 1), ids.flatten())


def test_forward_may_make_tensors_without_saying_where() -> None:
    with torch.device("meta"):
        hollow, ids = _SaysNoDevice(), torch.zeros(2, 8, dtype=torch.int64)
    graph = extract(hollow, (ids,))
    assert {p.name for p in graph.parameters} == {"tokens.weight", "places.weight"}
    torch.manual_seed(0)
    model, ids = _SaysNoDevice(), torch.randint(16, (2, 8))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert_close(execute(graph, state, (ids,)), model(ids), rtol=1e-6, atol=0)
    assert extract(hollow, (ids,), precision="mixed").spec("tokens.weight").dtype == "bfloat16"


class _MakesATensorOfANumber(nn.Module):
    """As GPT-Neo's masks: on the device of what it is for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        least = torch.tensor(-3.0, dtype=x.dtype, device=x.device)
        return (torch.where(x > 0, x, least) * self.scale).sum()


def test_numbers_may_become_tensors_on_the_meta_device() -> None:
    with torch.device("meta"):
        hollow = extract(_MakesATensorOfANumber(), (torch.empty(4, 2),))
    x = torch.tensor([[-1.0, 2.0]] * 4)
    assert execute(hollow, {"scale": torch.ones(2)}, (x,)).item() == 4 * (2.0 - 3.0)


class _Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.special.i0e(y).sum() + x[x > 0].sum()


def test_what_has_no_rule_is_listed_with_what_cannot_be_converted() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        extract(_Unsupported(), (torch.randn(4, 4),))
    said = str(refused.value)
    assert "aten.index.Tensor: the size of its result depends on the values" in said
    assert "aten.special_i0e.default(float32[4, 4]) in the model" in said
    assert said.count("aten.index") == 1
    assert "--propose" in said


def test_noise_has_no_gradient() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            gumbel = -torch.empty_like(y).exponential_().log()
            return (self.drop(y + torch.randn_like(y)) * gumbel * torch.rand(8, 1)).sum()

    graph = extract(Noisy(), (torch.randn(8, 4),))
    bound_rules(graph)
    drawn = [o for o in graph.operators if draws(o.op)]
    assert {o.op.split(".")[1] for o in drawn} == {"exponential", "randn_like", "rand", "bernoulli"}
    assert not any(graph.by_name[name].differentiable for o in drawn for name in o.outputs)
