"""From a resolved config and a data set to the problem of one stack."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdl_train.build import build
from bdl_train.data import Data, Part
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, Setting
from bdl_train.inference._optimizer import optimizer_from
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.models import Architecture, architecture_from
from bdl_train.models._dropout import Dropout
from bdl_train.potential import Potential, joint_prior
from bdl_train.priors import Prior
from bdl_train.schedulers import Schedule
from bdl_train.seeds import Stream, member_seed, run_seed
from bdl_train.stack import Layout, Stack, StackedNetwork, build_stack, choose_executor
from bdl_train.training.ranks import ALONE, Ranks
from bdl_train.training.settings import TrainerSettings

WORTH_COMPILING = 2000
"""Steps: compiling one takes about as long as this many small ones save."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The choices of a run as objects, checked against each other and against the data."""

    architecture: Architecture
    likelihood: Likelihood
    prior: Prior
    method: Method[Any]
    schedule: Schedule
    trainer: TrainerSettings
    optimizer: Mapping[str, Any]
    batch_size: int
    seed: int

    @classmethod
    def of(cls, config: Mapping[str, Any], data: Data) -> "Recipe":
        """Build and check everything that can be checked before a worker starts.

        Raises:
            UsageError: any setting that is wrong in itself or does not fit the others.
        """
        recipe = cls(
            architecture=architecture_from(config["model"]),
            likelihood=build(config["likelihood"], Likelihood, key="likelihood"),
            prior=build(config["prior"], Prior, key="prior"),
            method=build(config["inference"], Method, key="inference"),
            schedule=schedule_from(config["scheduler"]),
            trainer=build(config["trainer"], TrainerSettings, key="trainer"),
            optimizer=config["optimizer"],
            batch_size=config["data"]["batch_size"],
            seed=config["seed"],
        )
        recipe.likelihood.check(data.target)
        recipe.architecture.check(data.inputs)
        optimizer_from(recipe.optimizer)
        setting = recipe.setting(data)
        recipe.method.check(setting)
        _check_rows(recipe.method, setting, data)
        _check_together(recipe.method, recipe.trainer)
        if recipe.method.early_stopping is not None and len(data.val) == 0:
            raise UsageError(
                "Early stopping needs a validation part: set data.val_fraction above 0, or inference.patience=null."
            )
        # Two members of two stacks would be equal unseen if the model seeds itself: try it before anything starts.
        network, trial = build_stack(lambda: recipe.make_network(data), [1, 2])
        try:
            require_different(trial)
        except RuntimeError as error:
            raise UsageError(f"model: {error}") from error
        layout = Layout.of({name: tensor.detach() for name, tensor in network.named_parameters()})
        recipe.method.check_prior(recipe.prior.bind(layout, [0]))
        if recipe.method.needs_per_example_likelihood and _mixes_examples(network):
            raise UsageError(
                f"inference={_name(recipe.method)} needs a likelihood per example, which batch norm in train mode is "
                "not: use model.norm=group or model.norm=filter_response."
            )
        if recipe.method.needs_fixed_potential and (layer := next(_random_layers(network), None)):
            raise UsageError(
                f"inference={_name(recipe.method)} needs a potential that is one function of the weights, and the "
                f"network's {type(layer).__name__} makes it another one at each call: set the model's dropout "
                "rates to 0."
            )
        if recipe.method.needs_dropout:
            _require_dropout(_name(recipe.method), recipe.architecture, network)
        return recipe

    def num_data(self, data: Data) -> int:
        """N: training examples of one member, the same for all; it scales the likelihood against the prior."""
        return max(1, round(self.trainer.member_fraction * len(data.train)))

    def member_rows(self, data: Data, members: Sequence[int]) -> np.ndarray | None:
        """Which training examples each member sees: a function of (run seed, member), whatever its stack or attempt.

        Args:
            data: What the run trains on.
            members: Ensemble indices.

        Returns:
            Positions in the train part `[M, N]` int64, ascending; None when each member sees all of it.
        """
        num_rows, num_data = len(data.train), self.num_data(data)
        if num_data == num_rows:
            return None
        generators = (np.random.default_rng(member_seed(self.seed, m, Stream.ROWS)) for m in members)
        return np.stack([np.sort(one.choice(num_rows, num_data, replace=False)) for one in generators])

    def compiles_steps(self, setting: Setting, device: torch.device) -> bool:
        """Whether a method that can compile its whole step does so.

        `auto` does not on a GPU: with torch 2.11 on an H200, two of nine compiled chains left an interpreter whose
        objects were damaged.
        """
        if self.trainer.compile != "auto":
            return self.trainer.compile
        return device.type == "cpu" and self.method.steps_to_compile(setting) >= WORTH_COMPILING

    def setting(self, data: Data) -> Setting:
        """What the method may check, and plan its phases by."""
        num_data = self.num_data(data)
        return Setting(
            self.prior, self.likelihood, self.trainer.max_epochs, num_data, min(self.batch_size, num_data)
        )

    def make_network(self, data: Data) -> nn.Module:
        """One freshly initialised network, under the global generator as it stands."""
        return self.architecture.network(data.inputs, self.likelihood.num_outputs(data.target))

    def check_ranks(self, data: Data, num_ranks: int) -> None:
        """Whether a batch can be split over processes without changing what is computed.

        Raises:
            UsageError: examples depend on each other, masks on the process, or a process would have no rows.
        """
        if num_ranks == 1:
            return
        if not self.method.splits_batches:
            raise UsageError(
                f"cluster.ranks_per_stack={num_ranks}: inference={_name(self.method)} needs all rows of a batch in one "
                "process. Set it to 1."
            )
        rows = min(self.batch_size, self.num_data(data))
        if rows < num_ranks:
            raise UsageError(
                f"cluster.ranks_per_stack={num_ranks} needs a row for each rank in a batch of {rows}: raise "
                "data.batch_size, or trainer.member_fraction."
            )
        with torch.random.fork_rng(devices=[]):
            network = self.make_network(data)
        if _mixes_examples(network):
            raise UsageError(
                f"cluster.ranks_per_stack={num_ranks}: batch norm would see a part of each batch only. Use "
                "model.norm=group or model.norm=filter_response."
            )
        if any(isinstance(module, nn.modules.dropout._DropoutNd) for module in network.modules()):
            raise UsageError(
                f"cluster.ranks_per_stack={num_ranks}: masks of torch.nn dropout depend on the process. Use "
                "bdl_train.models._dropout.Dropout in your network."
            )

    def problem(
        self,
        data: Data,
        members: Sequence[int],
        attempt: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> tuple[Problem, str]:
        """The problem of one stack, and the reason for its executor."""
        extra = {
            PREFIX + name: torch.tensor(start) for name, (start, _, _) in self.likelihood.params().items()
        }
        seeds = [member_seed(self.seed, m, Stream.INIT, attempt) for m in members]
        dtype = self.trainer.dtype
        template, stack = build_stack(lambda: self.make_network(data), seeds, extra_params=extra, dtype=dtype)
        prior = joint_prior(self.prior, self.likelihood, stack.layout, list(members)).to(device, dtype)
        stack = stack.to(device)
        if self.prior.starts_members:
            weights = [name for name in stack.layout.names if not name.startswith(PREFIX)]
            for m, (member, seed) in enumerate(zip(members, seeds, strict=True)):
                # Bound for one member at a time: its start must not depend on its place in the stack.
                bound = self.prior.bind(stack.layout.select(weights), [member])
                draw = bound.sample(1, torch.Generator().manual_seed(seed)).reshape(-1)
                stack.flat[m, stack.layout.columns(weights)] = draw.to(device, dtype)
        require_different(stack)
        sample = torch.from_numpy(data.train.x[: min(len(data.train), 4)]).to(device)
        executor, reason = choose_executor(
            template.to(device), stack, data.inputs.prepare(sample, dtype), self.trainer.executor
        )
        potential = Potential(
            StackedNetwork(template, executor),
            self.likelihood,
            prior,
            self.num_data(data),
            stack.layout,
            compile=self.trainer.compile is True,
            reduce=ranks.mean if ranks.world > 1 else None,
        )
        if ranks.world > 1:
            mine = ranks.share(min(self.batch_size, self.num_data(data)))
            for module in template.modules():
                if isinstance(module, Dropout):
                    module.share = (mine.start, mine.stop - mine.start)
        problem = Problem(
            stack=stack,
            potential=potential,
            make_optimizer=optimizer_from(self.optimizer),
            schedule=self.schedule,
            setting=self.setting(data),
            noise_seeds=[member_seed(self.seed, m, Stream.NOISE, attempt) for m in members],
            clip_norm=self.trainer.clip_norm,
            compile_steps=self.compiles_steps(self.setting(data), device),
        )
        return problem, f"{executor}: {reason}"


def schedule_from(node: Mapping[str, Any]) -> Schedule:
    """The schedule of a config node.

    Raises:
        UsageError: a scheduler of torch, or anything else that is no `Schedule`.
    """
    target = str(node.get("_target_", ""))
    if target.startswith("torch."):
        raise UsageError(
            f"scheduler={target.rpartition('.')[2]} is one of torch's, which keep a state of their own and may look at "
            "the loss: members of a stack would share one decision. A schedule here is a function of the step: use "
            "scheduler=constant, cosine or step."
        )
    return build(node, Schedule, key="scheduler")


def require_different(stack: Stack) -> None:
    """Refuse members that start at the same weights: they would be one member counted twice.

    A network whose tensors all start as constants has nothing random to differ in; that is logged.

    Raises:
        RuntimeError: two members of a network with random initial values are equal.
    """
    if len({hash(flat.cpu().numpy().tobytes()) for flat in stack.flat}) == stack.num_members:
        return
    weights = [w.reshape(len(w), -1) for name, w in stack.params.items() if not name.startswith(PREFIX)]
    if any(bool((w != w[:, :1]).any()) for w in weights):
        raise RuntimeError(
            "Two members of a stack start at the same weights, so the ensemble would count one network twice. "
            "Does the model seed a generator or load weights in its constructor? Members are built one by one, "
            "each under its own seed: leave torch's global generator alone there."
        )
    log.warning("All initial weights are constants: members start equal and differ only by their data order.")


def split_seed(config: Mapping[str, Any]) -> int:
    """The seed of the run's random splits."""
    return run_seed(config["seed"], Stream.SPLIT) & 0xFFFFFFFF


@dataclass(frozen=True)
class DevicePart:
    """One part of the data on a device: `x` `[N, ...]` as stored, `y` `[N]`."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, part: Part, device: torch.device, dtype: torch.dtype) -> "DevicePart":
        y = torch.from_numpy(part.y)
        return cls(
            torch.from_numpy(part.x).to(device), y.to(device, dtype if y.is_floating_point() else y.dtype)
        )


def _check_rows(method: Method[Any], setting: Setting, data: Data) -> None:
    fixed = [phase for phase in method.phases(setting) if phase.rows != "shuffled"]
    if fixed and data.augment != "none":
        raise UsageError(
            f"inference={_name(method)} meets all training rows as they are in its phase '{fixed[0].name}': random "
            "views of them would be another target at each step. Use data.augment=none."
        )


def _check_together(method: Method[Any], trainer: TrainerSettings) -> None:
    if method.needs_fixed_potential and trainer.precision == "bf16-mixed":
        raise UsageError(
            f"inference={_name(method)} follows energies whose differences bfloat16 rounds away, so that chains stand "
            "still or drift: trainer.precision must be 32-true or 64-true, got bf16-mixed."
        )
    reason = method.members_interact
    if reason is None:
        return
    if trainer.on_divergence == "retry":
        raise UsageError(
            f"trainer.on_divergence=retry would train a diverged member once more without the others: {reason}. Use "
            "trainer.on_divergence=mark."
        )
    if trainer.member_fraction < 1:
        raise UsageError(
            f"trainer.member_fraction={trainer.member_fraction:g} gives each member a posterior of its own, but "
            f"{reason}: they need one in common. Use trainer.member_fraction=1."
        )


def _require_dropout(method: str, architecture: Architecture, network: nn.Module) -> None:
    layers = list(_random_layers(network))
    torchs = [type(layer).__name__ for layer in layers if not isinstance(layer, Dropout)]
    if torchs:
        raise UsageError(
            f"inference={method}: masks of torch.nn.{torchs[0]} follow a global generator and the batch, so no mask "
            "can be drawn that is one function of all rows, nor the same one again. Use "
            "bdl_train.models._dropout.Dropout in your network."
        )
    if not layers:
        rates = [f"model.{name}" for name in vars(architecture) if "dropout" in name]
        advice = (
            f"set {' or '.join(rates)} above 0"
            if rates
            else "this model has none to set: use model=mlp, lenet, wide_resnet or ft_transformer, or "
            "bdl_train.models._dropout.Dropout in your own network"
        )
        raise UsageError(f"inference={method} draws dropout masks, and the network has no dropout: {advice}.")


def _name(method: Method[Any]) -> str:
    """As it is written in a config."""
    return type(method).__module__.rpartition(".")[2]


def _random_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Layers with a dropout rate above 0, the project's own and torch's."""
    for module in network.modules():
        rate = 0.0
        if isinstance(module, Dropout):
            rate = module.rate
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            rate = module.dropout
        if rate > 0:
            yield module


def _mixes_examples(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
