"""Small posteriors over random weights, in memory or as an artefact on disk, for tests that never train."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdl_train.build import build
from bdl_train.likelihoods import PREFIX, Likelihood
from bdl_train.models import architecture_from
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import Artefact, write_member, write_meta, write_moments
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.stack import Stack, build_stack

MLP = {"_target_": "bdl_train.models.mlp.Mlp", "hidden": [8], "activation": "tanh", "dropout": 0.0}
RESNET = {"_target_": "bdl_train.models.resnet20.ResNet20", "width": 2, "norm": "batch"}
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "categorical": {"_target_": "bdl_train.likelihoods.categorical.Categorical"},
    "bernoulli": {"_target_": "bdl_train.likelihoods.bernoulli.Bernoulli"},
    "gaussian": {
        "_target_": "bdl_train.likelihoods.gaussian.Gaussian",
        "noise_std": 0.3,
        "learn_noise": True,
        "log_noise_prior_std": 1.0,
    },
    "heteroscedastic_gaussian": {
        "_target_": "bdl_train.likelihoods.heteroscedastic_gaussian.HeteroscedasticGaussian",
        "min_std": 1e-3,
    },
    "student_t": {
        "_target_": "bdl_train.likelihoods.student_t.StudentT",
        "df": 4.0,
        "scale": 0.3,
        "learn_scale": True,
        "log_scale_prior_std": 1.0,
    },
    "poisson": {"_target_": "bdl_train.likelihoods.poisson.Poisson"},
}
INPUTS = InputSpec((3,), groups=(1, 1, 1), names=("a", "b", "c"))
PIXELS = InputSpec((1, 8, 8), pixel_mean=(0.4,), pixel_std=(0.2,))


def target_for(likelihood: str) -> TargetSpec:
    if likelihood == "categorical":
        return TargetSpec(TargetKind.CLASS, "species", ("setosa", "versicolor", "virginica"))
    if likelihood == "bernoulli":
        return TargetSpec(TargetKind.CLASS, "diagnosis", ("benign", "malign"))
    if likelihood == "poisson":
        return TargetSpec(TargetKind.COUNT, "visits")
    return TargetSpec(TargetKind.CONTINUOUS, "price", loc=12.0, scale=2.5)


def random_stack(
    meta: dict[str, Any], num_members: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Stack:
    """Random members whose likelihood parameters differ, and whose buffers are not those of a fresh network."""
    likelihood = build(meta["likelihood"], Likelihood, key="likelihood")
    architecture = architecture_from(meta["architecture"])
    inputs, target = InputSpec.from_json(meta["inputs"]), TargetSpec.from_json(meta["target"])
    extra = {PREFIX + name: torch.tensor(start) for name, (start, _, _) in likelihood.params().items()}
    _, stack = build_stack(
        lambda: architecture.network(inputs, likelihood.num_outputs(target)),
        [seed + m for m in range(num_members)],
        extra_params=extra,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    for name in extra:
        column = stack.layout.columns([name])
        stack.flat[:, column] += torch.linspace(-0.5, 0.5, num_members)[:, None].to(dtype)
    for buffer in stack.buffers.values():
        if buffer.is_floating_point():
            buffer += 0.2 * torch.rand(buffer.shape, generator=generator).to(dtype)
    return stack


def gaussian_around(flat: Tensor, buffers: dict[str, Tensor], seed: int, rank: int = 4) -> LowRankGaussian:
    """A SWAG-like posterior of one member."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rank + 1, len(flat), generator=generator, dtype=torch.float64).to(flat.dtype)
    return LowRankGaussian(flat, (0.05 * noise[0]).square(), 0.1 * noise[1:], buffers)


def meta_of(
    likelihood: str = "categorical",
    *,
    architecture: dict[str, Any] = MLP,
    inputs: InputSpec = INPUTS,
    target: TargetSpec | None = None,
    num_draws: int = 1,
    dtype: str = "float32",
) -> dict[str, Any]:
    """`posterior.json` without what depends on the members."""
    return {
        "architecture": architecture,
        "likelihood": LIKELIHOODS[likelihood],
        "inputs": inputs.to_json(),
        "target": (target or target_for(likelihood)).to_json(),
        "transform": None,
        "dtype": dtype,
        "num_draws": num_draws,
        "draw_seed": 11,
    }


def members_of(stack: Stack, method: str, num_atoms: int = 3) -> list[MemberPosterior]:
    """One atom a member (`ensemble`), several (`atoms`), or a Gaussian around each (`swag`)."""
    if method == "ensemble":
        return Atoms.of_stack(stack)
    gaussians = [
        gaussian_around(stack.flat[m], {name: b[m] for name, b in stack.buffers.items()}, m)
        for m in range(stack.num_members)
    ]
    if method == "swag":
        return list(gaussians)
    finalised: list[MemberPosterior] = []
    for m, gaussian in enumerate(gaussians):
        flat = torch.stack([one for one, _ in gaussian.draw(num_atoms, m)])
        factors = torch.arange(1, num_atoms + 1)
        buffers = {
            name: torch.stack([b[m] * k if b.is_floating_point() else b[m] for k in factors])
            for name, b in stack.buffers.items()
        }
        finalised.append(Atoms(flat, buffers))
    return finalised


def small_artefact(
    likelihood: str = "categorical",
    method: str = "ensemble",
    *,
    num_members: int = 3,
    num_draws: int = 1,
    **meta_settings: Any,
) -> Artefact:
    """An artefact that was never on disk."""
    meta = meta_of(likelihood, num_draws=num_draws, **meta_settings)
    stack = random_stack(meta, num_members, dtype=getattr(torch, meta["dtype"]))
    members = members_of(stack, method)
    return Artefact(
        meta=meta,
        posterior=EnsemblePosterior(list(range(num_members)), members, num_draws, meta["draw_seed"]),
        architecture=architecture_from(meta["architecture"]),
        likelihood=build(meta["likelihood"], Likelihood, key="likelihood"),
        inputs=InputSpec.from_json(meta["inputs"]),
        target=TargetSpec.from_json(meta["target"]),
        transform=None,
        layout=stack.layout,
    )


def write_artefact(folder: Path, artefact: Artefact, *, lost: tuple[int, ...] = ()) -> dict[str, Any]:
    """Write it as training does; returns the content of `posterior.json` without the schema version."""
    posterior = artefact.posterior
    members = []
    for index, member in zip(posterior.ids, posterior.members, strict=True):
        if index in lost:
            members.append({"id": index, "status": "failed", "reason": "diverged"})
        else:
            members.append({"id": index, "status": "done", **write_member(folder, index, member)})
    layout = {
        "names": list(artefact.layout.names),
        "shapes": [list(shape) for shape in artefact.layout.shapes],
    }
    meta = {**artefact.meta, "layout": layout, "members": members}
    meta["files"] = {"moments.safetensors": write_moments(folder, posterior)}
    write_meta(folder, meta)
    return meta
