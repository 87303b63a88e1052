"""What the prior believes before any data: functions drawn from it, as a plot and a summary.

Shape letters: S prior draws, B rows, P parameters.
"""

from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bdl_train.data import Data
from bdl_train.files import write_json
from bdl_train.likelihoods import PREFIX
from bdl_train.potential import joint_prior
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.stats import ClassStats, stats_of
from bdl_train.runs import RunDir
from bdl_train.seeds import Stream, run_seed
from bdl_train.specs import TargetSpec
from bdl_train.stack import StackedNetwork, build_stack, choose_executor
from bdl_train.training.problem import Recipe

NUM_DRAWS = 200
NUM_ROWS = 256


@dataclass(frozen=True)
class PriorCheck:
    """Prior predictive of some training rows.

    Attributes:
        summary: Numbers by name, each explained in `meaning`, and a `verdict` in words.
        curves: For the plot.
    """

    summary: dict[str, Any]
    curves: dict[str, np.ndarray]


def check_prior(run: RunDir, recipe: Recipe, data: Data) -> None:
    """Write `prior_check/summary.json` and `prior_check/prior_predictive.png`, and print the verdict."""
    components, y = prior_predictive(recipe, data)
    check = summarise(components, y, data.target)
    folder = run.path / "prior_check"
    write_json(folder / "summary.json", check.summary)
    _plot(folder / "prior_predictive.png", check, data.target)
    print(f"prior: {check.summary['verdict']}\nprior: {folder / 'prior_predictive.png'}")


def prior_predictive(recipe: Recipe, data: Data, num_draws: int = NUM_DRAWS) -> tuple[Distribution, Tensor]:
    """Predictive components `[S, B]` of networks drawn from the prior, on training rows, and their targets `[B]`."""
    seed = run_seed(recipe.seed, Stream.PRIOR_CHECK)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train), generator=generator)[:NUM_ROWS].numpy()
    x = data.inputs.prepare(torch.from_numpy(data.train.x[rows]), torch.float32)
    extra = {PREFIX + name: torch.tensor(start) for name, (start, _, _) in recipe.likelihood.params().items()}
    template, stack = build_stack(lambda: recipe.make_network(data), [seed], extra_params=extra)
    prior = joint_prior(recipe.prior, recipe.likelihood, stack.layout, [0])
    flat = prior.sample(num_draws, generator).reshape(num_draws, -1)
    executor, _ = choose_executor(template, stack, x[:2], recipe.trainer.executor)
    network = StackedNetwork(template, executor)
    outputs = []
    with torch.no_grad():
        for chunk in flat.split(20):
            buffers = {
                name: buffer.expand(len(chunk), *buffer.shape[1:]) for name, buffer in stack.buffers.items()
            }
            # Train mode: untrained running statistics would say nothing about the functions that training sees.
            params = stack.layout.unflatten(chunk)
            outputs.append(network(params, buffers, x, train=bool(buffers), shared=True)[0])
    components = recipe.likelihood.distribution(torch.cat(outputs), stack.layout.unflatten(flat))
    return components, torch.from_numpy(data.train.y[rows])


@singledispatch
def summarise(components: Distribution, y: Tensor, target: TargetSpec) -> PriorCheck:
    """Of numeric targets, in the target's units: where functions lie, and whether the data look possible."""
    num_draws = components.batch_shape[0]
    log_weights = torch.full((num_draws,), -float(np.log(num_draws)))
    mixture = Mixture(components, log_weights)
    edges = (
        mixture.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).numpy() * target.scale
        + target.loc
    )
    pit = mixture.cdf(y.double()).numpy()
    stats = stats_of(components, log_weights, None)
    spread = float(stats.total.mean().sqrt())
    data_std = float(y.double().std())
    inside = float(np.mean((pit > 0.025) & (pit < 0.975)))
    ratio = spread / max(data_std, 1e-12)
    if not np.isfinite(ratio) or np.isnan(pit).any():
        verdict = "far too wide: the prior predictive overflows; lower prior.scale"
    elif inside < 0.9:
        verdict = (
            f"too narrow: only {inside:.0%} of the targets lie inside its 95 % interval; raise prior.scale"
        )
    elif ratio > 10:
        verdict = f"very wide: it spreads {ratio:.0f} times as far as the targets; try prior.fan_in=true"
    else:
        verdict = f"plausible: it covers {inside:.0%} of the targets and spreads {ratio:.1f} times as far as they do"
    raw = y.double().numpy() * target.scale + target.loc
    means = components.mean.double().numpy() * target.scale + target.loc
    return PriorCheck(
        {
            "verdict": verdict,
            "prior_std": spread * target.scale,
            "target_std": data_std * target.scale,
            "targets_inside_95": inside,
            "num_draws": num_draws,
            "num_rows": len(y),
            "meaning": {
                "prior_std": "standard deviation of the prior predictive, in the target's units",
                "targets_inside_95": "share of training targets inside its central 95 % interval",
            },
        },
        {"targets": raw, "draws": means, "lower_95": edges[0], "upper_95": edges[1]},
    )


@summarise.register(Bernoulli)
@summarise.register(Categorical)
def _(components: Distribution, y: Tensor, target: TargetSpec) -> PriorCheck:
    """Of classes: how sure single functions are, and how likely each class is on average."""
    num_draws = components.batch_shape[0]
    stats = stats_of(components, torch.full((num_draws,), -float(np.log(num_draws))), None)
    assert isinstance(stats, ClassStats)
    probs = components.probs  # pyright: ignore[reportAttributeAccessIssue]
    confidence = torch.maximum(probs, 1 - probs) if probs.ndim == 2 else probs.max(-1).values
    sure = float((confidence > 0.95).double().mean())
    class_probs = stats.mean_probs.mean(0).numpy()
    if sure > 0.5:
        verdict = f"overconfident: {sure:.0%} of its predictions are above 95 % before any data; try prior.fan_in=true"
    else:
        verdict = f"plausible: {sure:.0%} of its predictions are more than 95 % sure before any data"
    return PriorCheck(
        {
            "verdict": verdict,
            "share_above_95_percent": sure,
            "mean_confidence": float(confidence.double().mean()),
            "class_probs": dict(zip(target.classes, class_probs.tolist(), strict=True)),
            "mutual_information": float(stats.epistemic.mean()),
            "num_draws": num_draws,
            "num_rows": len(y),
            "meaning": {
                "mean_confidence": "largest class probability of a single network drawn from the prior, on average",
                "mutual_information": "disagreement between draws, in nats",
            },
        },
        {"confidence": confidence.flatten().numpy()},
    )


def _plot(path: Path, check: PriorCheck, target: TargetSpec) -> None:
    import io

    from matplotlib.figure import Figure

    from bdl_train.files import write_bytes

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    curves = check.curves
    if "confidence" in curves:
        axes.hist(curves["confidence"], bins=40, color="#0072B2")
        axes.set_xlabel("largest class probability of one network drawn from the prior")
        axes.set_ylabel("predictions")
    else:
        order = np.argsort(curves["targets"])
        position = np.arange(len(order))
        axes.fill_between(
            position, curves["lower_95"][order], curves["upper_95"][order], color="#56B4E9", alpha=0.4,
            label="prior predictive, central 95 %",
        )  # fmt: skip
        for draw in curves["draws"][:8]:
            axes.plot(position, draw[order], color="#0072B2", linewidth=0.5, alpha=0.6)
        axes.plot([], [], color="#0072B2", linewidth=0.8, label="mean functions of 8 draws")
        axes.plot(
            position, curves["targets"][order], color="#D55E00", linewidth=1.5, label="training targets"
        )
        axes.set_xlabel("training rows, sorted by target")
        axes.set_ylabel(target.name)
        figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    axes.set_title(check.summary["verdict"], fontsize=9, wrap=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_bytes(path, buffer.getvalue())
