"""Small problems for tests of methods and training: networks, data, and a plain loop over a method's steps."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from bdl_train.data import Data, Part
from bdl_train.inference import Method, Problem, Setting, State, StepLog
from bdl_train.inference._optimizer import optimizer_from
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.likelihoods.gaussian import Gaussian as GaussianLikelihood
from bdl_train.models.ft_transformer import FtTransformer
from bdl_train.models.mlp import Mlp
from bdl_train.potential import Batch, Potential, joint_prior
from bdl_train.priors import Prior
from bdl_train.priors.gaussian import Gaussian
from bdl_train.schedulers import Schedule
from bdl_train.schedulers.constant import Constant
from bdl_train.seeds import Stream, member_seed
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.stack import Executor, StackedNetwork, build_stack
from bdl_train.training.feed import PhaseFeed, StepFeed
from bdl_train.training.timeline import Timeline

CONF = Path(__file__).parents[1] / "conf"
RUN_SEED = 5
SGD = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
KNOWN_NOISE = GaussianLikelihood(noise_std=0.5, learn_noise=False, log_noise_prior_std=1.0)
LEARNED_NOISE = GaussianLikelihood(noise_std=0.5, learn_noise=True, log_noise_prior_std=0.5)


def node_of(group: str, name: str) -> dict[str, Any]:
    """A shipped config as a plain mapping."""
    node = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


class SmallConvNet(nn.Module):
    """Two convolutions with a norm: what a user might write, small enough for many steps."""

    def __init__(self, num_outputs: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False),
            norm(3),
            nn.Tanh(),
            nn.Conv2d(3, 4, 3, bias=False),
            norm(4),
            nn.Tanh(),
        )
        self.head = nn.Linear(4, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((-2, -1)))


@dataclass(frozen=True)
class Example:
    """A data set and an architecture for it."""

    inputs: InputSpec
    x: Tensor
    y: Tensor
    likelihood: Likelihood
    make_network: Callable[[], nn.Module]

    def to(self, dtype: torch.dtype) -> "Example":
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return Example(self.inputs, self.x.to(dtype), y, self.likelihood, self.make_network)


def _x(num_data: int, spec: InputSpec) -> Tensor:
    return torch.randn(num_data, *spec.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _regression(num_data: int, make: Callable[[InputSpec], nn.Module], likelihood: Likelihood) -> Example:
    spec = InputSpec((4,), (1, 1, 2))
    x = _x(num_data, spec)
    noise = torch.randn(num_data, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Example(spec, x, x[:, 0].sin() - 0.5 * x[:, 1] + 0.3 * noise, likelihood, lambda: make(spec))


def _classes(num_data: int, spec: InputSpec, make: Callable[[InputSpec], nn.Module]) -> Example:
    x = _x(num_data, spec)
    scores = x.flatten(1)[:, :3] + 0.3
    return Example(spec, x, scores.argmax(1), Categorical(), lambda: make(spec))


def _ft_transformer(spec: InputSpec) -> nn.Module:
    return FtTransformer(
        width=6,
        num_heads=2,
        num_blocks=1,
        ffn_width=5,
        attention_dropout=0.2,
        ffn_dropout=0.1,
        residual_dropout=0.1,
    ).network(spec, 3)


def example(name: str, num_data: int = 26) -> Example:
    """One of `EXAMPLES`, or `conv-group-norm`."""
    if name == "conv-group-norm":
        return _classes(
            num_data, InputSpec((2, 6, 6)), lambda spec: SmallConvNet(3, lambda width: nn.GroupNorm(1, width))
        )
    return EXAMPLES[name](num_data)


EXAMPLES: dict[str, Callable[[int], Example]] = {
    "mlp": lambda n: _regression(
        n, lambda spec: Mlp(hidden=[6], activation="tanh", dropout=0.0).network(spec, 1), KNOWN_NOISE
    ),
    "mlp-dropout": lambda n: _regression(
        n, lambda spec: Mlp(hidden=[6, 5], activation="gelu", dropout=0.3).network(spec, 1), LEARNED_NOISE
    ),
    "conv-batch-norm": lambda n: _classes(n, InputSpec((2, 6, 6)), lambda spec: SmallConvNet(3)),
    "ft_transformer": lambda n: _classes(n, InputSpec((4,), (1, 1, 2)), _ft_transformer),
}


@dataclass(frozen=True)
class Work:
    """A problem with the data that its batches come from."""

    problem: Problem
    example: Example
    feed_seeds: Sequence[int]
    batch_size: int

    def timeline(self, method: Method[Any]) -> Timeline:
        return Timeline(method.phases(self.problem.setting))

    def feed(self, timeline: Timeline, state: State) -> PhaseFeed:
        shuffled = StepFeed(
            self.feed_seeds, len(self.example.y), self.batch_size, 1, lambda: timeline.shuffled_step(state)
        )
        return PhaseFeed(shuffled, timeline, state)

    def batch(self, index_MB: Tensor) -> Batch:
        return Batch(self.example.x[index_MB], self.example.y[index_MB], index_MB)

    def all_rows(self) -> Batch:
        return Batch(self.example.x, self.example.y, torch.arange(len(self.example.y)), shared=True)

    def advance(self, method: Method[Any], state: State, num_steps: int | None = None) -> list[StepLog]:
        """Take steps over the members' own data orders, from where the state stands; to the end, or so many."""
        logs, timeline = [], self.timeline(method)
        stop = timeline.num_steps if num_steps is None else timeline.step(state) + num_steps
        feed = self.feed(timeline, state)
        while timeline.step(state) < stop:
            if state.step == timeline.phase(state).num_steps and not timeline.is_last(state):
                state.phase, state.step, state.active = state.phase + 1, 0, ~state.failed
                method.enter(state)
            for call in feed:
                batch = self.all_rows() if isinstance(call, int) else self.batch(call[0])
                logs.append(method.step(state, batch))
                if timeline.step(state) == stop:
                    break
        return logs


def work(
    of: Example,
    members: Sequence[int],
    *,
    executor: Executor = "vmap",
    dtype: torch.dtype = torch.float64,
    prior: Prior | None = None,
    optimizer: dict[str, Any] | None = None,
    schedule: Schedule | None = None,
    batch_size: int = 8,
    num_epochs: int = 17,
    clip_norm: float | None = None,
) -> Work:
    """The problem that `training` would hand to a method, for the members of one stack."""
    of = of.to(dtype)
    extra = {PREFIX + name: torch.tensor(start) for name, (start, _, _) in of.likelihood.params().items()}
    seeds = [member_seed(RUN_SEED, m, Stream.INIT) for m in members]
    template, stack = build_stack(of.make_network, seeds, extra_params=extra, dtype=dtype)
    bound = joint_prior(
        prior or Gaussian(scale=0.5, fan_in=False), of.likelihood, stack.layout, list(members)
    )
    num_data = len(of.y)
    problem = Problem(
        stack=stack,
        potential=Potential(
            StackedNetwork(template, executor), of.likelihood, bound.to("cpu", dtype), num_data, stack.layout
        ),
        make_optimizer=optimizer_from(optimizer or SGD),
        schedule=schedule or Constant(),
        setting=Setting(
            prior or Gaussian(scale=0.5, fan_in=False),
            of.likelihood,
            num_epochs,
            num_data,
            min(batch_size, num_data),
        ),
        noise_seeds=[member_seed(RUN_SEED, m, Stream.NOISE) for m in members],
        clip_norm=clip_norm,
    )
    orders = [member_seed(RUN_SEED, m, Stream.ORDER) for m in members]
    return Work(problem, of, orders, min(batch_size, num_data))


def through_disk(stored: Any) -> Any:
    """What a checkpoint gives back: written and read without unpickling code."""
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def data_of(of: Example, *, num_val: int = 8, num_test: int = 4) -> Data:
    """The same examples as `training` gets them: float32, the last ones for validation and test."""
    num_train = len(of.y) - num_val - num_test
    x = of.x.float().numpy()
    y = of.y.float().numpy() if of.y.is_floating_point() else of.y.numpy()
    stops = np.cumsum([0, num_train, num_val, num_test])
    train, val, test = (
        Part(x[start:stop], y[start:stop], np.arange(start, stop)) for start, stop in pairwise(stops)
    )
    if of.y.is_floating_point():
        target = TargetSpec(TargetKind.CONTINUOUS)
    else:
        target = TargetSpec(TargetKind.CLASS, classes=("a", "b", "c"))
    return Data("tiny", train, val, test, of.inputs, target)


def config_of(**changed: Any) -> dict[str, Any]:
    """A resolved config that trains `example("mlp")` for 6 epochs in float64; groups are merged with `changed`."""
    config: dict[str, Any] = {
        "model": {**node_of("model", "mlp"), "hidden": [6], "activation": "tanh"},
        "likelihood": {**node_of("likelihood", "gaussian"), "noise_std": 0.5, "learn_noise": False},
        "prior": {**node_of("prior", "gaussian"), "scale": 0.5},
        "inference": {**node_of("inference", "deep_ensemble"), "patience": None},
        "optimizer": node_of("optimizer", "adam"),
        "scheduler": node_of("scheduler", "constant"),
        "trainer": {
            **node_of("trainer", "default"),
            "max_epochs": 6,
            "precision": "64-true",
            "steps_per_call": 2,
        },
        "data": {"batch_size": 8},
        "seed": RUN_SEED,
    }
    for group, settings in changed.items():
        config[group] = settings if "_target_" in settings else {**config[group], **settings}
    return config
