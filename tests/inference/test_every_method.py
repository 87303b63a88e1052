"""Promises that every method keeps, whatever its YAML."""

import dataclasses
import math
import pkgutil
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_problems import CONF, EXAMPLES, KNOWN_NOISE, SGD, Work, example, node_of, through_disk, work
from torch import Tensor

import bdl_train.inference
from bdl_train.build import build, resolve
from bdl_train.inference import Method
from bdl_train.inference._descent import DescentState

CONFIGS = sorted(path.stem for path in (CONF / "inference").glob("*.yaml"))
EXECUTORS = ("vmap", "loop")
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}
STACK = [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def shipped(name: str, **changed: Any) -> Method[Any]:
    return build({**node_of("inference", name), **changed}, Method, key="inference")


def result(method: Method[Any], state: DescentState) -> dict[str, Tensor]:
    """Everything the members learned, `[M, ...]` each: weights, buffers, optimiser state and posterior."""
    own = [tensor for tensor in state.optimizer._per_member() if tensor is not state.stack.flat]
    found = {f"optimizer {i}": tensor.clone() for i, tensor in enumerate(own)}
    found |= {
        "flat": state.stack.flat.clone(),
        "failed": state.failed.clone(),
        "active": state.active.clone(),
    }
    found |= {f"buffer {name}": buffer.clone() for name, buffer in state.stack.buffers.items()}
    stored = [posterior.tensors() for posterior in method.posterior(state)]
    return found | {f"posterior {name}": torch.stack([one[name] for one in stored]) for name in stored[0]}


def trained(the_work: Work, method: Method[Any], num_steps: int) -> dict[str, Tensor]:
    state = method.init(the_work.problem)
    the_work.advance(method, state, num_steps)
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
    fields = dataclasses.fields(resolve(target, Method, key="inference"))  # pyright: ignore[reportArgumentType]
    assert set(settings) == {field.name for field in fields}
    assert all(field.default is dataclasses.MISSING for field in fields)


CHANGED: dict[str, dict[str, Any]] = {
    "deep_ensemble": {"patience": 3},
    "anchored": {"patience": 3, "perturb_targets": False},
    "swag": {"start_epoch": 1, "snapshot_every": 2, "lr_factor": 0.5, "max_rank": 2, "num_draws": 7},
}


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name in CONFIGS for field in node_of("inference", name) if field != "_target_"],
)
def test_every_setting_changes_the_result(name: str, field: str):
    def effects(method: Method[Any]) -> list[Any]:
        the_work = work(example("mlp"), [0, 1], num_epochs=8)
        tensors = trained(the_work, method, the_work.problem.num_steps)
        return [method.num_draws, method.early_stopping, {key: t.tolist() for key, t in tensors.items()}]

    assert effects(shipped(name)) == effects(shipped(name))
    assert effects(shipped(name)) != effects(shipped(name, **{field: CHANGED[name][field]}))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", ["mlp-dropout", "conv-batch-norm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_gives_the_same_bits(name: str, network: str, executor: Any):
    first, second = (
        trained(work(example(network), [0, 3], executor=executor, num_epochs=3), shipped(name), 9)
        for _ in range(2)
    )
    assert_same_bits(first, second)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_alone_is_the_member_of_a_stack_after_50_steps_in_float64(
    name: str, network: str, executor: Any
):
    # The transformer is slow and the same for all methods: the others take a few steps of it.
    num_steps = 50 if network != "ft_transformer" or name == "deep_ensemble" else 12
    method, settings = shipped(name), {"executor": executor, "num_epochs": math.ceil(num_steps / 3)}
    alone = trained(work(example(network), [4], **settings), method, num_steps)
    stacked = trained(work(example(network), STACK, **settings), method, num_steps)
    assert not stacked["failed"].any()
    # atol is for entries that are 0 but for round-off, such as gradients of weights in front of a batch norm.
    assert_near({key: t[4:5] for key, t in stacked.items()}, alone, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_alone_is_the_member_of_a_stack_after_10_steps_in_float32(
    name: str, network: str, executor: Any
):
    method = shipped(name)

    def weights(members: list[int]) -> Tensor:
        the_work = work(example(network), members, executor=executor, dtype=torch.float32)
        state = method.init(the_work.problem)
        the_work.advance(method, state, 10)
        return state.stack.flat

    torch.testing.assert_close(weights(STACK)[2:3], weights([2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", EXAMPLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_executors_agree(name: str, network: str):
    vmap, loop = (
        trained(work(example(network), [0, 1, 2], executor=executor, num_epochs=4), shipped(name), 12)
        for executor in EXECUTORS
    )
    assert_near(vmap, loop, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_members_permutes_results(name: str):
    order = [3, 0, 2, 1]
    straight = trained(work(example("mlp-dropout"), [0, 1, 2, 3], num_epochs=6), shipped(name), 18)
    permuted = trained(work(example("mlp-dropout"), order, num_epochs=6), shipped(name), 18)
    assert_near({key: t[order] for key, t in straight.items()}, permuted, rtol=1e-10, atol=1e-13)
    assert not torch.equal(straight["flat"], permuted["flat"])


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("network", ["mlp-dropout", "conv-batch-norm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_loaded_and_continued_gives_the_same_bits(name: str, network: str, optimizer: Any):
    def fresh() -> Work:
        return work(example(network), [0, 1, 2], optimizer=optimizer, num_epochs=6, clip_norm=1.0)

    method, through = shipped(name), fresh()
    state = method.init(through.problem)
    through.advance(method, state, 11)
    stored = through_disk(state.state_dict())
    through.advance(method, state, 7)

    resumed = fresh()
    other = method.init(resumed.problem)
    other.load_state_dict(stored)
    assert other.step == 11
    resumed.advance(method, other, 7)
    assert_same_bits(result(method, other), result(method, state))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_states_of_one_problem_share_no_tensor_but_the_weights(name: str):
    method, the_work = shipped(name), work(example("mlp"), [0, 1], num_epochs=4)
    state = method.init(the_work.problem)
    the_work.advance(method, state, the_work.problem.num_steps)
    fresh = method.init(the_work.problem)
    assert fresh.step == 0
    assert bool(fresh.active.all())
    assert "moments" not in fresh.state_dict() or fresh.state_dict()["moments"]["num_snapshots"] == 0


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_global_generators_are_untouched(name: str, executor: Any):
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    method, the_work = shipped(name), work(example("mlp-dropout"), [0, 1], executor=executor, num_epochs=4)
    state = method.init(the_work.problem)
    the_work.advance(method, state, the_work.problem.num_steps)
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
        the_work = work(
            example(network), [0, 1, 2], executor=executor, optimizer=ADAM, num_epochs=7, clip_norm=1.0
        )
        state = method.init(the_work.problem)
        the_work.advance(method, state, 16)
        if value is not None:
            state.stack.flat[lost] = value
        before = result(method, state)
        the_work.advance(method, state, 5)
        return before, result(method, state)

    before, after = run(bad)
    _, healthy = run(None)
    assert after["failed"].tolist() == [False, True, False]
    assert after["active"].tolist() == [True, False, True]
    frozen = [key for key in after if key == "flat" or key.startswith(("buffer", "optimizer"))]
    assert len(frozen) >= 3
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
    the_work.advance(method, state, the_work.problem.num_steps)
    assert state.failed.tolist() == [True, False, False]
    assert bool(state.stack.flat[0].isinf().all())
    assert bool(state.stack.flat[1:].isfinite().all())


def test_examples_cover_known_and_learned_noise():
    assert example("mlp").likelihood is KNOWN_NOISE
    assert example("mlp-dropout").likelihood.params() != {}
