"""Stacks: a member alone, in a stack, under vmap, in a loop and as an ordinary module is the same network."""

import copy
import itertools
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdl_train.models.ft_transformer import FtTransformer
from bdl_train.models.mlp import Mlp
from bdl_train.models.resnet20 import ResNet20
from bdl_train.specs import InputSpec
from bdl_train.stack import Layout, Stack, StackedNetwork, build_stack, choose_executor

torch.set_num_threads(1)

M, B = 7, 5
TABLE = InputSpec((6,), (1, 2, 3))
IMAGE = InputSpec((2, 8, 8))

FT = FtTransformer(
    width=8,
    num_heads=2,
    num_blocks=2,
    ffn_width=10,
    attention_dropout=0.2,
    ffn_dropout=0.1,
    residual_dropout=0.1,
)
NETWORKS: dict[str, tuple[InputSpec, Callable[[], nn.Module]]] = {
    "mlp": (TABLE, lambda: Mlp(hidden=[9, 8], activation="tanh", dropout=0.0).network(TABLE, 3)),
    "mlp-dropout": (TABLE, lambda: Mlp(hidden=[9, 8], activation="relu", dropout=0.3).network(TABLE, 3)),
    "conv-batch-norm": (IMAGE, lambda: ResNet20(width=2, norm="batch").network(IMAGE, 3)),
    "ft_transformer": (TABLE, lambda: FT.network(TABLE, 3)),
}
EXECUTORS = ("vmap", "loop")


def train(network: StackedNetwork, stack: Stack, xs: Tensor, lr: float = 1e-3) -> list[dict[str, Tensor]]:
    """SGD on the sum of squared outputs; outputs, gradients, weights and buffers of every step."""
    flat, buffers, steps = stack.flat, stack.buffers, []
    for x in xs:
        leaf = flat.detach().clone().requires_grad_(True)
        outputs, buffers = network(stack.layout.unflatten(leaf), buffers, x, train=True)
        (grad,) = torch.autograd.grad(outputs.square().sum(), leaf)
        flat = flat - lr * grad
        buffers = {name: buffer.detach() for name, buffer in buffers.items()}
        steps.append({"outputs": outputs.detach(), "grad": grad, "flat": flat, **buffers})
    return steps


def assert_equal_steps(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(actual) == len(expected)
    for step, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.keys() == other.keys()
        for name in one:
            # A weight in front of a norm has a gradient of cancelling terms: allow round-off of the largest.
            atol = 1e-13 * other[name].abs().max().item() if name in ("grad", "flat") else 0
            torch.testing.assert_close(
                one[name],
                other[name],
                rtol=1e-8,
                atol=atol,
                msg=lambda text, s=step, n=name: f"step {s}, {n}: {text}",
            )


def inputs_of(spec: InputSpec, steps: int, members: int = M) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(steps, members, B, *spec.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_member_alone_is_the_member_of_a_stack_in_outputs_gradients_weights_and_buffers(name, executor):
    spec, make = NETWORKS[name]
    xs = inputs_of(spec, steps=4)
    template, stack = build_stack(make, range(10, 10 + M), dtype=torch.float64)
    together = train(StackedNetwork(template, executor), stack, xs)
    for m in (0, 4, 6):
        template, alone = build_stack(make, [10 + m], dtype=torch.float64)
        expected = train(StackedNetwork(template, executor), alone, xs[:, m : m + 1])
        assert_equal_steps(
            [{key: value[m : m + 1] for key, value in step.items()} for step in together], expected
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_both_executors_give_equal_results(name):
    spec, make = NETWORKS[name]
    xs = inputs_of(spec, steps=4)
    template, stack = build_stack(make, range(M), dtype=torch.float64)
    runs = [train(StackedNetwork(template, executor), stack, xs) for executor in EXECUTORS]
    assert_equal_steps(*runs)
    evals = [
        StackedNetwork(template, executor)(stack.params, stack.buffers, xs[0], train=False)[0]
        for executor in EXECUTORS
    ]
    torch.testing.assert_close(*evals, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_shared_batch_is_the_batch_repeated_for_every_member(name, executor):
    spec, make = NETWORKS[name]
    template, stack = build_stack(make, range(3), dtype=torch.float64)
    network = StackedNetwork(template, executor)
    x = inputs_of(spec, steps=1)[0, 0]
    shared, shared_buffers = network(stack.params, stack.buffers, x, train=True, shared=True)
    own, own_buffers = network(stack.params, stack.buffers, x.expand(3, *x.shape), train=True)
    torch.testing.assert_close(shared, own, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(shared_buffers, own_buffers, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_callers_buffers_and_parameters_stay_as_they_were(name, executor):
    spec, make = NETWORKS[name]
    template, stack = build_stack(make, range(3), dtype=torch.float64)
    before = copy.deepcopy(stack)
    network = StackedNetwork(template, executor)
    for mode in (True, False):
        _, after = network(stack.params, stack.buffers, inputs_of(spec, 1, 3)[0], train=mode)
        assert torch.equal(stack.flat, before.flat)
        assert stack.buffers.keys() == before.buffers.keys() == after.keys()
        for key in stack.buffers:
            assert torch.equal(stack.buffers[key], before.buffers[key])
            moves = mode and not key.endswith("seed")
            assert torch.equal(after[key], before.buffers[key]) != moves, key


class Counts(nn.Module):
    """Writes to one buffer in place and replaces another, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.linear(x)
        self.mean = y.mean(0)
        return y


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("mode", [True, False])
def test_a_module_that_writes_its_buffers_in_any_mode_leaves_the_callers_alone(executor, mode):
    template, stack = build_stack(Counts, range(3), dtype=torch.float64)
    outputs, after = StackedNetwork(template, executor)(
        stack.params, stack.buffers, inputs_of(TABLE, 1, 3)[0], train=mode
    )
    assert stack.buffers["calls"].tolist() == [0, 0, 0]
    assert after["calls"].tolist() == [1, 1, 1]
    assert not stack.buffers["mean"].any()
    torch.testing.assert_close(after["mean"], outputs.mean(1))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["mlp", "conv-batch-norm"])
def test_training_in_a_stack_is_training_an_ordinary_module(name, executor):
    # The other route: no functional call, no flat vector, torch's own optimiser.
    spec, make = NETWORKS[name]
    xs = inputs_of(spec, steps=5, members=3)
    template, stack = build_stack(make, [5, 6, 7], dtype=torch.float64)
    last = train(StackedNetwork(template, executor), stack, xs)[-1]
    params = stack.layout.unflatten(last["flat"])
    for m in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5 + m)
            module = make().double().train()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for x in xs[:, m]:
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
        for key, value in module.named_parameters():
            torch.testing.assert_close(params[key][m], value.detach(), rtol=1e-8, atol=1e-11)
        for key, value in module.named_buffers():
            torch.testing.assert_close(last[key][m], value, rtol=1e-8, atol=1e-11)
    if name == "conv-batch-norm":
        assert last["1.num_batches_tracked"].tolist() == [5, 5, 5]
        assert (last["1.running_var"] != 1).all()


class UserTransformer(nn.Module):
    """A packed attention projection and a bare token: both are skipped by `reset_parameters` on a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(-1).expand(-1, -1, 8)
        return self.layer(torch.cat([self.token.expand(len(x), 1, 8), tokens], 1))[:, 0]


RANDOM = {
    "mlp": {"0.weight", "0.bias", "4.weight"},
    "mlp-dropout": {"0.weight", "6.bias"},
    "conv-batch-norm": {"0.weight", "13.weight"},
    "ft_transformer": {
        "tokenizer.cls",
        "tokenizer.weight",
        "tokenizer.bias",
        "blocks.0.attention.query.weight",
        "blocks.1.attention.key.weight",
        "blocks.1.attention.value.weight",
        "blocks.0.attention.out.weight",
    },
    "user": {"token", "layer.self_attn.in_proj_weight", "layer.linear1.weight"},
}


@pytest.mark.parametrize("name", RANDOM)
def test_members_differ_pairwise_in_every_random_parameter(name):
    make = UserTransformer if name == "user" else NETWORKS[name][1]
    _, stack = build_stack(make, range(4))
    params = stack.params
    # What starts constant (norm scales, zero biases) is not random.
    random = {key for key, value in params.items() if value[0].numel() > 1 and value[0].unique().numel() > 1}
    assert random >= RANDOM[name]
    for key in random:
        for i, j in itertools.combinations(range(4), 2):
            assert not torch.equal(params[key][i], params[key][j]), key
    seeds = [value for key, value in stack.buffers.items() if key.endswith("seed")]
    assert len(seeds) == {"mlp-dropout": 2, "ft_transformer": 8}.get(name, 0)
    assert len({int(seed) for value in seeds for seed in value}) == 4 * len(seeds)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_seed_gives_the_same_network_wherever_it_stands(name):
    _, make = NETWORKS[name]
    template, stack = build_stack(make, [5, 2**62, 5])
    _, other = build_stack(make, [2**62])
    assert torch.equal(stack.flat[0], stack.flat[2])
    assert torch.equal(stack.flat[1], other.flat[0])
    for key in stack.buffers:
        assert torch.equal(stack.buffers[key][0], stack.buffers[key][2])
        assert torch.equal(stack.buffers[key][1], other.buffers[key][0])
    for key, value in template.named_parameters():
        assert torch.equal(stack.params[key][0], value)


def test_building_a_stack_and_choosing_an_executor_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    template, stack = build_stack(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), range(3))
    flat = stack.flat.clone()
    assert choose_executor(template, stack, torch.ones(4, 6), "auto")[0] == "vmap"
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(stack.flat, flat)


def test_double_precision_holds_the_values_drawn_in_single():
    _, single = build_stack(NETWORKS["conv-batch-norm"][1], [1, 2])
    template, double = build_stack(NETWORKS["conv-batch-norm"][1], [1, 2], dtype=torch.float64)
    assert torch.equal(single.flat.double(), double.flat)
    assert double.buffers["1.running_mean"].dtype == torch.float64
    assert double.buffers["1.num_batches_tracked"].dtype == torch.int64
    assert all(value.dtype == torch.float64 for value in template.parameters())


def test_a_stack_of_no_seeds_is_refused():
    with pytest.raises(ValueError, match="one member or more"):
        build_stack(NETWORKS["mlp"][1], [])


def test_parameters_of_the_likelihood_stand_last_and_the_network_ignores_them():
    make = NETWORKS["mlp"][1]
    extra = {"likelihood.log_noise": torch.tensor(-1.5)}
    template, plain = build_stack(make, [1, 2])
    _, stack = build_stack(make, [1, 2], extra_params=extra)
    assert stack.layout.names == (*plain.layout.names, "likelihood.log_noise")
    assert stack.params["likelihood.log_noise"].tolist() == [-1.5, -1.5]
    x = torch.ones(2, B, 6)
    for executor in EXECUTORS:
        network = StackedNetwork(template, executor)
        assert torch.equal(
            network(stack.params, {}, x, train=False)[0], network(plain.params, {}, x, train=False)[0]
        )


def test_members_picks_copies_in_the_order_asked():
    _, stack = build_stack(NETWORKS["conv-batch-norm"][1], range(4))
    part = stack.members([3, 1])
    assert part.num_members == 2
    assert torch.equal(part.flat, torch.stack([stack.flat[3], stack.flat[1]]))
    part.flat.zero_()
    part.buffers["1.running_var"].zero_()
    assert stack.flat[3].any()
    assert stack.buffers["1.running_var"].all()


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_tied_weight_is_one_parameter_used_twice(executor):
    template, stack = build_stack(Tied, [1, 2], dtype=torch.float64)
    assert stack.layout.names == ("first.weight",)
    x = inputs_of(TABLE, 1, 2)[0]
    outputs, _ = StackedNetwork(template, executor)(stack.params, {}, x, train=True)
    weight = stack.params["first.weight"]
    torch.testing.assert_close(outputs, x @ weight.mT @ weight.mT)


# --- Layout


@st.composite
def layouts(draw) -> Layout:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5))
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_flatten_and_unflatten_undo_each_other(layout, lead):
    flat = torch.arange(float(torch.Size(lead).numel() * layout.num_params)).reshape(*lead, layout.num_params)
    params = layout.unflatten(flat)
    assert [tuple(value.shape) for value in params.values()] == [lead + shape for shape in layout.shapes]
    assert torch.equal(layout.flatten(params), flat)
    shuffled = dict(reversed(params.items()))
    assert torch.equal(layout.flatten(shuffled), flat)


@settings(max_examples=30, deadline=None)
@given(layouts(), st.data())
def test_columns_are_where_the_named_parameters_lie(layout, data):
    names = data.draw(st.lists(st.sampled_from(layout.names), unique=True))
    flat = torch.arange(2.0 * layout.num_params).reshape(2, -1)
    picked = flat[:, layout.columns(names)]
    part = layout.select(names)
    assert part.num_params == picked.shape[1]
    whole = layout.unflatten(flat)
    if names:
        for name, value in part.unflatten(picked).items():
            assert torch.equal(value, whole[name])


def test_params_are_views_of_the_flat_vector():
    _, stack = build_stack(NETWORKS["mlp"][1], [1, 2])
    stack.params["0.bias"].fill_(7.0)
    assert (stack.flat[:, stack.layout.columns(["0.bias"])] == 7).all()
    assert (stack.flat == 7).sum() == 2 * 9


# --- Choice of an executor


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(-1))[0][:, -1]


class Silent(nn.Module):
    """Fails without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("asked", ["auto", "vmap"])
def test_a_network_without_batching_rule_runs_in_a_loop_and_the_log_says_why(caplog, asked):
    template, stack = build_stack(Lstm, range(3))
    with caplog.at_level(logging.WARNING, "bdl_train.stack"):
        executor, reason = choose_executor(template, stack, torch.ones(4, 6), asked)
    assert executor == "loop"
    assert "aten::lstm" in reason
    assert "aten::lstm" in caplog.text
    outputs, _ = StackedNetwork(template, executor)(stack.params, {}, torch.ones(3, 4, 6), train=True)
    assert outputs.shape == (3, 4, 4)


def test_a_failure_without_words_is_named_by_its_type():
    template, stack = build_stack(Silent, range(3))
    assert choose_executor(template, stack, torch.ones(4, 6), "auto") == (
        "loop",
        "not vmappable: AssertionError()",
    )


@pytest.mark.parametrize(
    ("name", "members", "asked", "expected"),
    [
        ("mlp", 3, "auto", "vmap"),
        ("mlp", 1, "auto", "loop"),
        ("mlp", 1, "vmap", "vmap"),
        ("mlp", 3, "loop", "loop"),
        ("mlp-dropout", 3, "auto", "vmap"),
        ("ft_transformer", 3, "auto", "vmap"),
        ("conv-batch-norm", 3, "auto", "loop"),  # slower under vmap on a CPU
        ("conv-batch-norm", 3, "vmap", "vmap"),
    ],
)
def test_which_executor_is_chosen(name, members, asked, expected):
    spec, make = NETWORKS[name]
    template, stack = build_stack(make, range(members))
    executor, reason = choose_executor(template, stack, torch.randn(4, *spec.shape), asked)
    assert executor == expected
    assert reason


@pytest.mark.parametrize("mode", [True, False])
def test_attention_of_torch_runs_under_vmap_without_a_fallback_and_equals_the_loop(mode):
    # A fallback would warn, and warnings are errors here.
    template, stack = build_stack(UserTransformer, range(3), dtype=torch.float64)
    x = inputs_of(TABLE, 1, 3)[0]
    results = []
    for executor in EXECUTORS:
        leaf = stack.flat.clone().requires_grad_(True)
        outputs, _ = StackedNetwork(template, executor)(stack.layout.unflatten(leaf), {}, x, train=mode)
        results.append((outputs, *torch.autograd.grad(outputs.square().sum(), leaf)))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)
    assert choose_executor(template, stack, x[0], "auto")[0] == "vmap"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_torchs_own_dropout_in_a_user_module_works(executor):
    template, stack = build_stack(lambda: nn.Sequential(nn.Linear(6, 200), nn.Dropout(0.25)), range(3))
    network = StackedNetwork(template, executor)
    x = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped, _ = network(stack.params, {}, x, train=True)
    plain, _ = network(stack.params, {}, x, train=False)
    kept = dropped != 0
    # 30,000 units, standard error 0.0025
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.0125)
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    assert not torch.equal(kept[0], kept[1])
