"""Optimisers over a stack: members do not meet, inactive ones stand still, gradients are clipped one by one."""

from typing import Any

import pytest
import torch
from tiny_problems import CONF, Example, example, node_of, through_disk, work
from torch import Tensor, nn

from bdl_train.errors import UsageError
from bdl_train.inference._descent import DescentState, descend
from bdl_train.inference._optimizer import FlatOptimizer, optimizer_from

SHIPPED = {path.stem: node_of("optimizer", path.stem) for path in (CONF / "optimizer").glob("*.yaml")}
FURTHER = ("Adagrad", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
NODES: dict[str, dict[str, Any]] = {
    **SHIPPED,
    **{name: {"_target_": f"torch.optim.{name}", "lr": 0.02} for name in FURTHER},
    "Adadelta": {"_target_": "torch.optim.Adadelta", "lr": 1.0},
    "adam-amsgrad": {"_target_": "torch.optim.Adam", "lr": 0.02, "amsgrad": True, "weight_decay": 0.1},
    "rmsprop-centred": {"_target_": "torch.optim.RMSprop", "lr": 0.02, "centered": True, "momentum": 0.5},
    "sgd-nesterov": {"_target_": "torch.optim.SGD", "lr": 0.02, "nesterov": True, "momentum": 0.9},
}
M, P, STEPS = 7, 37, 50


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def start_and_grads() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(M, P, generator=generator, dtype=torch.float64)
    return start, torch.randn(STEPS, M, P, generator=generator, dtype=torch.float64)


def per_member_state(optimizer: FlatOptimizer) -> list[Tensor]:
    return [
        value.clone()
        for value in optimizer.optimizer.state[optimizer.flat].values()
        if torch.is_tensor(value) and value.shape == optimizer.flat.shape
    ]


@pytest.mark.parametrize("name", NODES)
def test_members_in_a_stack_move_as_alone(name: str):
    make, (start, grads) = optimizer_from(NODES[name]), start_and_grads()

    def run(rows: slice) -> Tensor:
        optimizer = FlatOptimizer(make, start[rows].clone())
        for step, grad in enumerate(grads):
            optimizer.step(grad[rows].clone(), 1 - step / STEPS, None)
        return optimizer.flat

    together = run(slice(0, M))
    alone = torch.cat([run(slice(m, m + 1)) for m in range(M)])
    assert (together - start).abs().max() > 0.01
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NODES)
def test_it_is_the_torch_optimiser_with_the_learning_rate_of_the_schedule(name: str):
    start, grads = start_and_grads()
    ours = FlatOptimizer(optimizer_from(NODES[name]), start.clone())
    settings = {key: value for key, value in NODES[name].items() if key != "_target_"}
    param = nn.Parameter(start.clone())
    plain = getattr(torch.optim, NODES[name]["_target_"].rpartition(".")[2])([param], **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, lambda step: 0.9**step)
    for step, grad in enumerate(grads):
        ours.step(grad.clone(), 0.9**step, None)
        param.grad = grad.clone()
        plain.step()
        schedule.step()
    torch.testing.assert_close(ours.flat, param.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first_masked_step", [0, 20])
@pytest.mark.parametrize("name", NODES)
def test_inactive_members_keep_weights_and_optimiser_state_and_the_others_do_not_notice(
    name: str, first_masked_step: int
):
    make, (start, grads) = optimizer_from(NODES[name]), start_and_grads()
    masked, free = (FlatOptimizer(make, start.clone()) for _ in range(2))
    active = torch.tensor([True, False, True, True, False, True, True])
    for grad in grads[:first_masked_step]:
        masked.step(grad.clone(), 1.0, None)
        free.step(grad.clone(), 1.0, None)
    weights, state = masked.flat.clone(), per_member_state(masked) if first_masked_step else []
    for grad in grads[first_masked_step:]:
        broken = grad.clone()
        broken[1], broken[4] = torch.nan, 1e30
        masked.step(broken, 1.0, active)
        free.step(grad.clone(), 1.0, None)
    assert torch.equal(masked.flat[~active], weights[~active])
    assert torch.equal(masked.flat[active], free.flat[active])
    now = per_member_state(masked)
    for before, after in zip(state, now, strict=bool(state)):
        assert torch.equal(after[~active], before[~active])
    for one, other in zip(now, per_member_state(free), strict=True):
        assert torch.equal(one[active], other[active])
        assert bool(one.isfinite().all())


def test_a_zero_gradient_would_not_freeze_adam():
    make, (start, grads) = optimizer_from(SHIPPED["adam"]), start_and_grads()
    optimizer = FlatOptimizer(make, start.clone())
    for grad in grads[:10]:
        optimizer.step(grad.clone(), 1.0, None)
    before = optimizer.flat.clone()
    optimizer.step(torch.zeros(M, P, dtype=torch.float64), 1.0, None)
    assert (optimizer.flat - before).abs().min() > 1e-6
    before = optimizer.flat.clone()
    optimizer.step(grads[10].clone(), 1.0, torch.zeros(M, dtype=torch.bool))
    assert torch.equal(optimizer.flat, before)


@pytest.mark.parametrize("name", NODES)
def test_a_saved_and_loaded_optimiser_continues_with_the_same_bits(name: str):
    make, (start, grads) = optimizer_from(NODES[name]), start_and_grads()
    straight = FlatOptimizer(make, start.clone())
    for grad in grads[:25]:
        straight.step(grad.clone(), 0.7, None)
    stored, weights = through_disk(straight.state_dict()), straight.flat.clone()
    resumed = FlatOptimizer(make, weights)
    resumed.load_state_dict(stored)
    for grad in grads[25:]:
        straight.step(grad.clone(), 0.3, None)
        resumed.step(grad.clone(), 0.3, None)
    assert torch.equal(straight.flat, resumed.flat)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", ["1e-2x", "1e-2", float("nan"), float("inf"), None, True, [0.1]])
def test_a_number_that_is_none_is_refused_by_its_key(key: str, value: Any):
    with pytest.raises(UsageError) as caught:
        optimizer_from({**SHIPPED["adam"], key: value})
    assert str(caught.value) == f"optimizer.{key} must be a finite number, got {value!r}."


REFUSED = {
    "LBFGS": "closure",
    "Adafactor": "its update of one member depends on the other members",
    "Muon": "its update of one member depends on the other members",
    "SparseAdam": "does not support dense gradients",
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimisers_that_mix_members_are_refused_with_the_reason(name: str):
    with pytest.raises(
        UsageError, match=f"optimizer={name} cannot train a stack of members: .*{REFUSED[name]}"
    ):
        optimizer_from({"_target_": f"torch.optim.{name}", "lr": 0.01})


class GlobalNormSgd(torch.optim.Optimizer):
    """Divides by the norm of the whole gradient: harmless for one network, wrong for a stack."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad / param.grad.norm()


def test_a_users_optimiser_that_mixes_members_is_refused(monkeypatch):
    monkeypatch.setenv("BDL_ALLOW", __name__)
    node = {"_target_": f"{__name__}.GlobalNormSgd", "lr": 0.01}
    with pytest.raises(UsageError, match="its update of one member depends on the other members"):
        optimizer_from(node)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "torch.optim.SGD", "lr": -1.0}, "SGD refused its settings.*-1.0"),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "rho": 1}, "Unknown key 'optimizer.rho': SGD has"),
        ({"_target_": "torch.nn.Linear", "lr": 0.1}, "optimizer._target_ is 'torch.nn.Linear', expected"),
        ({"lr": 0.1}, "optimizer._target_"),
    ],
)
def test_wrong_optimiser_settings_are_usage_errors(node: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        optimizer_from(node)


def one_step(of: Example, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """The change of every member in a step of SGD at lr 1, and the reported norms."""
    the_work = work(
        of, [0, 1, 2, 3], optimizer={"_target_": "torch.optim.SGD", "lr": 1.0}, clip_norm=clip_norm
    )
    state = DescentState(the_work.problem)
    state.stack.flat[1] *= 6.0  # one member far out, with a large gradient
    before = state.stack.flat.clone()
    log = descend(state, the_work.batch(torch.arange(32).reshape(4, 8) % 26), 1.0)
    return before - state.stack.flat, log.grad_norm


def test_clipping_is_torchs_clipping_of_each_member_alone():
    of, clip_norm = example("mlp"), 2.5
    raw_MP, norm_M = one_step(of, None)
    clipped_MP, reported_M = one_step(of, clip_norm)
    torch.testing.assert_close(norm_M, reported_M, rtol=0, atol=0)
    assert (norm_M > clip_norm).any()
    assert (norm_M < clip_norm).any()
    for m in range(4):
        param = nn.Parameter(torch.zeros_like(raw_MP[m]))
        param.grad = raw_MP[m].clone()
        nn.utils.clip_grad_norm_([param], clip_norm)
        # torch divides by norm + 1e-6.
        torch.testing.assert_close(clipped_MP[m], param.grad, rtol=1e-5, atol=1e-12)
