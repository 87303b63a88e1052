"""Promises that every method keeps, whatever its YAML."""

import dataclasses
import math
import pkgutil
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_methods import NAMES as CONFIGS
from small_methods import class_of, shipped
from tiny_problems import EXAMPLES, KNOWN_NOISE, SGD, Work, example, node_of, through_disk, work
from torch import Tensor

import bdl_train.inference
from bdl_train.distributed.split import _cut
from bdl_train.inference import Method, State
from bdl_train.priors.gaussian import Gaussian
from bdl_train.schedulers.step import Step

EXECUTORS = ("vmap", "loop")
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}
STACK = [0, 1, 2, 3, 4, 5, 6]
OBSERVERS = ("active", "failed", "noise", "kept", "moments")
"""Of a state: what goes on beside a member that is frozen."""
DRAWS_FROM_ITS_PRIOR = ("anchored",)
"""Methods whose anchors are prior draws: the fourth power of the prior is a narrower one."""
INDEPENDENT = [name for name in CONFIGS if not class_of(name).members_interact]
"""What holds for members that are on their own holds for these."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def fitting(name: str, network: str) -> str:
    """The network, without batch norm where the method refuses it."""
    return "conv-group-norm" if network == "conv-batch-norm" and refuses_batch_norm(name) else network


def refuses_batch_norm(name: str) -> bool:
    return shipped(name).needs_per_example_likelihood


def tensors_in(node: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor of a state that has a member axis, by its path."""
    if isinstance(node, dict):
        return {
            key: t for name, value in node.items() for key, t in tensors_in(value, f"{path}/{name}").items()
        }
    return {path[1:]: node.clone()} if torch.is_tensor(node) and node.ndim > 0 else {}


def result(method: Method[Any], state: State, *, ended: bool = True) -> dict[str, Tensor]:
    """Everything the members learned, `[M, ...]` each: the whole state and, at the end, the posterior."""
    found = tensors_in(state.state_dict())
    if ended:
        stored = [posterior.tensors() for posterior in method.posterior(state)]
        found |= {f"posterior/{name}": torch.stack([one[name] for one in stored]) for name in stored[0]}
    return found


def trained(the_work: Work, method: Method[Any]) -> dict[str, Tensor]:
    """The members after all steps."""
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    return result(method, state)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_method_has_a_config_and_every_config_a_method():
    modules = {module.name for module in pkgutil.iter_modules(bdl_train.inference.__path__)}
    assert set(CONFIGS) == {name for name in modules if not name.startswith("_")}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_lists_every_setting_of_its_class(name: str):
    settings = node_of("inference", name)
    target = settings.pop("_target_")
    assert target.startswith(f"bdl_train.inference.{name}.")
    fields = dataclasses.fields(class_of(name))  # pyright: ignore[reportArgumentType]
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


CHANGED: dict[str, dict[str, Any]] = {
    "mean_field_vi": {
        "temperature": 0.5,
        "initial_std": 0.02,
        "num_train_samples": 1,
        "num_draws": 7,
        "patience": 3,
    },
    "ivon": {
        "lr": 0.02,
        "temperature": 0.5,
        "initial_curvature": 0.5,
        "momentum": 0.5,
        "curvature_decay": 0.99,
        "clip_radius": 0.01,
        "num_train_samples": 1,
        "num_draws": 7,
    },
    "laplace": {
        "patience": 3,
        "structure": "diagonal",
        "prior_precision": "keep",
        "predictive": "sampled",
        "temperature": 0.5,
        "num_draws": 7,
    },
    "mc_dropout": {"patience": 3, "num_draws": 7},
    "snapshot": {"num_cycles": 4, "num_draws": 3},
    "hmc": {
        "patience": 3,
        "temperature": 0.5,
        "num_warmup": 22,
        "num_draws": 2,
        "thin": 1,
        "num_leapfrog": 3,
        "target_accept": 0.6,
        "mass": "identity",
    },
    "svgd": {"temperature": 20.0, "bandwidth": 0.5},
    "repulsive_ensemble": {"temperature": 20.0, "bandwidth": 0.5},
    "deep_ensemble": {"patience": 3},
    "anchored": {"patience": 3, "perturb_targets": False},
    "mclmc": {
        "patience": 3,
        "temperature": 0.5,
        "num_warmup": 50,
        "step_size": 0.01,
        "energy_variance_start": 0.1,
        "energy_variance_end": 0.1,
        "integrator": "leapfrog",
        "num_draws": 2,
        "thin": 2,
    },
    "sgld": {
        "lr": 0.01,
        "temperature": 0.5,
        "start_epoch": 1,
        "burn_in_epochs": 2,
        "thin": 1,
        "num_draws": 2,
        "preconditioner": "rmsprop",
    },
    "sghmc": {
        "lr": 0.01,
        "friction": 0.5,
        "temperature": 0.5,
        "start_epoch": 1,
        "burn_in_epochs": 2,
        "thin": 1,
        "num_draws": 2,
        "preconditioner": "rmsprop",
    },
    "cyclical_sgmcmc": {
        "lr": 0.02,
        "temperature": 0.5,
        "num_cycles": 1,
        "exploration": 0.25,
        "kernel": "sgld",
        "friction": 0.3,
        "preconditioner": "none",
        "num_draws": 4,
    },
    "swag": {"start_epoch": 1, "snapshot_every": 2, "lr_factor": 0.5, "max_rank": 2, "num_draws": 7},
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in CONFIGS for field in node_of("inference", name) if field != "_target_"],
)
def test_every_setting_changes_the_result(name: str, field: str):
    def effects(method: Method[Any]) -> list[Any]:
        the_work = work(example("mlp"), [0, 1], num_epochs=8)
        tensors = trained(the_work, method)
        return [method.num_draws, method.early_stopping, {key: t.tolist() for key, t in tensors.items()}]

    assert effects(shipped(name)) == effects(shipped(name))
    assert effects(shipped(name)) != effects(shipped(name, **{field: CHANGED[name][field]}))


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("name", ["sgld", "sghmc", "swag"])
def test_what_is_said_to_be_unused_has_no_effect(name: str, start: int):
    method = shipped(name, start_epoch=start)
    unused = method.unused_with({"start_epoch": start})

    def weights(**changed: Any) -> Tensor:
        return trained(work(example("mlp"), [0, 1], num_epochs=8, **changed), method)["flat"]

    assert torch.equal(weights(), weights(optimizer=ADAM)) == ("optimizer" in unused)
    assert torch.equal(weights(), weights(schedule=Step(milestones=[0.01], gamma=0.5))) == (
        "scheduler" in unused
    )


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", ["mlp-dropout", "conv-batch-norm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_gives_the_same_bits(name: str, network: str, executor: Any):
    first, second = (
        trained(work(example(fitting(name, network)), [0, 3], executor=executor, num_epochs=3), shipped(name))
        for _ in range(2)
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_member_alone_is_the_member_of_a_stack_after_50_steps_in_float64(
    name: str, network: str, executor: Any
):
    # The transformer is slow and the same for all methods: the others take a few steps of it.
    num_epochs = 17 if network != "ft_transformer" or name == "deep_ensemble" else 4
    method, network = shipped(name), fitting(name, network)
    by_itself = trained(work(example(network), [4], executor=executor, num_epochs=num_epochs), method)
    stacked = trained(work(example(network), STACK, executor=executor, num_epochs=num_epochs), method)
    assert not stacked["failed"].any()
    # atol is for entries that are 0 but for round-off, such as gradients of weights in front of a batch norm.
    assert_near({key: t[4:5] for key, t in stacked.items()}, by_itself, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_member_alone_is_the_member_of_a_stack_after_10_steps_in_float32(
    name: str, network: str, executor: Any
):
    method = shipped(name)

    def weights(members: list[int]) -> Tensor:
        of = example(fitting(name, network))
        the_work = work(of, members, executor=executor, dtype=torch.float32)
        state = method.init(the_work.problem)
        the_work.advance(method, state, 10)
        return state.stack.flat

    torch.testing.assert_close(weights(STACK)[2:3], weights([2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_executors_agree(name: str, network: str):
    vmap, loop = (
        trained(
            work(example(fitting(name, network)), [0, 1, 2], executor=executor, num_epochs=4), shipped(name)
        )
        for executor in EXECUTORS
    )
    assert_near(vmap, loop, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_members_permutes_results(name: str):
    order = [3, 0, 2, 1]
    straight = trained(work(example("mlp-dropout"), [0, 1, 2, 3], num_epochs=6), shipped(name))
    permuted = trained(work(example("mlp-dropout"), order, num_epochs=6), shipped(name))
    assert_near({key: t[order] for key, t in straight.items()}, permuted, rtol=1e-10, atol=1e-13)
    assert not torch.equal(straight["flat"], permuted["flat"])


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("network", ["mlp-dropout", "conv-batch-norm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_loaded_and_continued_gives_the_same_bits(
    name: str, network: str, optimizer: Any, share: float
):
    def fresh() -> Work:
        of = example(fitting(name, network))
        return work(of, [0, 1, 2], optimizer=optimizer, num_epochs=6, clip_norm=1.0)

    method, through = shipped(name), fresh()
    state, timeline = method.init(through.problem), through.timeline(method)
    before = round(share * timeline.num_steps)
    through.advance(method, state, before)
    stored = through_disk(state.state_dict())
    through.advance(method, state)

    resumed = fresh()
    other = method.init(resumed.problem)
    other.load_state_dict(stored)
    assert timeline.step(other) == before
    resumed.advance(method, other)
    assert_same_bits(result(method, other), result(method, state))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_saved_where_a_phase_ends_goes_on_with_the_same_bits(name: str):
    """Checkpoints at the end of an epoch are written before the next phase is entered."""

    def fresh() -> Work:
        return work(example(fitting(name, "mlp")), [0, 1], optimizer=ADAM, num_epochs=6)

    method, straight = shipped(name), fresh()
    expected = method.init(straight.problem)
    straight.advance(method, expected)
    phases = straight.timeline(method).phases
    for count in range(1, len(phases)):
        before, resumed = fresh(), fresh()
        state, other = method.init(before.problem), method.init(resumed.problem)
        before.advance(method, state, sum(phase.num_steps for phase in phases[:count]))
        other.load_state_dict(through_disk(state.state_dict()))
        resumed.advance(method, other)
        assert_same_bits(result(method, other), result(method, expected))


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old parts
@pytest.mark.parametrize("name", ["mclmc", "hmc"])
def test_a_compiled_chain_taken_up_where_it_samples_goes_on_with_the_same_bits(name: str, caplog):
    def fresh() -> Work:
        plain = work(example("mlp"), [0, 1], num_epochs=2)
        return replace(plain, problem=replace(plain.problem, compile_steps=True))

    method, through, resumed = shipped(name), fresh(), fresh()
    state, timeline = method.init(through.problem), through.timeline(method)
    through.advance(method, state, timeline.num_steps - 2)
    assert timeline.phase(state).name == "sample"
    stored = through_disk(state.state_dict())
    through.advance(method, state)
    # Its graph is the first that this problem's prior and likelihood are traced for.
    other = method.init(resumed.problem)
    other.load_state_dict(stored)
    resumed.advance(method, other)
    assert "uncompiled" not in caplog.text
    assert_same_bits(result(method, other), result(method, state))


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_state_cut_into_halves_is_the_state_of_each_half(name: str):
    """Every tensor of a state has the member axis first: what cuts a stack that crashes looks at nothing else."""
    method = shipped(name)

    def fresh(members: list[int]) -> Work:
        return work(example("mlp-dropout"), members, optimizer=ADAM, num_epochs=6)

    whole = fresh(STACK)
    state = method.init(whole.problem)
    assert {len(t) for t in tensors_in(state.state_dict()).values()} <= {len(STACK)}
    timeline = whole.timeline(method)
    whole.advance(method, state, timeline.num_steps - 4)
    stored = through_disk(state.state_dict())
    assert {len(t) for t in tensors_in(stored).values()} == {len(STACK)}
    whole.advance(method, state)

    half = fresh(STACK[4:])
    other = method.init(half.problem)
    other.load_state_dict(_cut(stored, torch.tensor(STACK[4:]), len(STACK)))
    half.advance(method, other)
    of_half = {key: t[4:] for key, t in result(method, state).items()}
    assert_near(of_half, result(method, other), rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in DRAWS_FROM_ITS_PRIOR])
def test_four_times_the_data_and_the_prior_at_four_times_the_temperature_are_the_same_posterior(name: str):
    """exp(−N · potential / T) with 4N, 4T and the prior to the fourth is the same target, and so is the way to it."""
    settings = node_of("inference", name)
    plain = example("mlp")
    four = replace(plain, x=plain.x.repeat(4, 1), y=plain.y.repeat(4))
    warm = {"temperature": 4 * settings["temperature"]} if "temperature" in settings else {}
    one, other = (
        trained(
            work(of, [0, 1], batch_size=len(of.y), num_epochs=12, prior=Gaussian(scale=std, fan_in=False)),
            shipped(name, **changed),
        )
        for of, std, changed in ((plain, 1.0, {}), (four, 0.5, warm))
    )
    # Potentials and energies hold the prior's normaliser, which is another one.
    same = [key for key in one if not key.endswith(("potential", "/energy"))]
    assert_near({key: one[key] for key in same}, {key: other[key] for key in same}, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_states_of_one_problem_share_no_tensor_but_the_weights(name: str):
    method, the_work = shipped(name), work(example("mlp"), [0, 1], num_epochs=4)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    fresh = method.init(the_work.problem)
    assert fresh.step == 0
    assert bool(fresh.active.all())
    again = tensors_in(method.init(work(example("mlp"), [0, 1], num_epochs=4).problem).state_dict())
    begun = tensors_in(fresh.state_dict())
    for key in again:
        assert key == "flat" or torch.equal(begun[key], again[key]), key


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_global_generators_are_untouched(name: str, executor: Any):
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    method, the_work = shipped(name), work(example("mlp-dropout"), [0, 1], executor=executor, num_epochs=4)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    for posterior in method.posterior(state):
        list(posterior.draw(method.num_draws, seed=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("network", "bad"),
    [("mlp", math.nan), ("mlp", 1e200), ("mlp-dropout", math.inf), ("conv-batch-norm", math.nan)],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_diverged_member_is_frozen_and_leaves_the_others_alone(
    name: str, network: str, executor: Any, bad: float
):
    method, lost, others = shipped(name), 1, [0, 2]

    def run(value: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        of = example(fitting(name, network))
        the_work = work(of, [0, 1, 2], executor=executor, optimizer=ADAM, num_epochs=7, clip_norm=1.0)
        state = method.init(the_work.problem)
        the_work.advance(method, state, the_work.timeline(method).num_steps - 5)
        if value is not None:
            state.stack.flat[lost] = value
        before = result(method, state, ended=False)
        the_work.advance(method, state)
        return before, result(method, state)

    before, after = run(bad)
    _, healthy = run(None)
    assert after["failed"].tolist() == [False, True, False]
    assert after["active"].tolist() == [True, False, True]
    if method.members_interact:
        assert all(bool(after[key][others].isfinite().all()) for key in after)
        return
    frozen = [key for key in before if key.split("/")[0] not in OBSERVERS]
    assert len(frozen) >= 2
    for key in frozen:
        assert torch.equal(after[key][lost].nan_to_num(7.0), before[key][lost].nan_to_num(7.0)), key
    for key in after:
        if key not in ("failed", "active"):
            assert torch.equal(after[key][others], healthy[key][others]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_that_diverges_at_the_first_step_is_frozen_too(name: str):
    method, the_work = shipped(name), work(example("mlp"), [0, 1, 2], optimizer=ADAM, num_epochs=4)
    the_work.problem.stack.flat[0] = torch.inf
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert state.failed.tolist() == [True, False, False]
    assert bool(state.stack.flat[0].isinf().all())
    assert bool(state.stack.flat[1:].isfinite().all())


def test_examples_cover_known_and_learned_noise():
    assert example("mlp").likelihood is KNOWN_NOISE
    assert example("mlp-dropout").likelihood.params() != {}
