"""Speed and memory of the predictive pass, as ratios within one run. One thread.

Speed: `Predictor(executor="measured")` against a plain loop over the members' networks that averages probabilities and
computes the same uncertainties. CPU seconds, turns taken alternately; the ratio is the median over turns.
Memory: peak resident memory of a process that makes one pass with 1000 posterior samples, against 10; the part that the
pass adds to what imports and weights take is printed too.

    python scripts/bench/bench_predict.py [--quick]
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bdl_train.likelihoods import Likelihood
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian
from bdl_train.models import Architecture
from bdl_train.models.lenet import LeNet
from bdl_train.models.mlp import Mlp
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.atoms import Atoms
from bdl_train.posteriors.ensemble import EnsemblePosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.predictive.predict import Predictor
from bdl_train.specs import InputSpec, TargetKind, TargetSpec
from bdl_train.stack import Stack, build_stack

BATCHES = (1, 32, 256, 2048, 16384)
FEWER_SAMPLES, SAMPLES = 10, 1000
MOST_MEMORY, LEAST_SPEED, LEAST_SPEED_OF_ONE = 1.2, 1.0, 5.0
NOISE = 0.05
"""Of a ratio on a shared machine: a few members, or convolutions, can do no better than the loop itself."""


def make_artefact(
    architecture: Architecture,
    inputs: InputSpec,
    likelihood: Likelihood,
    target: TargetSpec,
    num_members: int,
    posterior: Callable[[Stack], list[MemberPosterior]],
    num_draws: int,
) -> Artefact:
    _, stack = build_stack(
        lambda: architecture.network(inputs, likelihood.num_outputs(target)), range(num_members)
    )
    members = EnsemblePosterior(range(num_members), posterior(stack), num_draws, 0)
    meta = {"dtype": "float32"}
    return Artefact(meta, members, architecture, likelihood, inputs, target, None, stack.layout)


# --- speed ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_loop(networks: list[nn.Module], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean probabilities, total, aleatoric and epistemic uncertainty, as anyone would write it."""
    mean, aleatoric = torch.zeros(()), torch.zeros(())
    for network in networks:
        probs = network(x).softmax(-1)
        mean = mean + probs / len(networks)
        aleatoric = aleatoric + torch.special.entr(probs).sum(-1) / len(networks)
    total = torch.special.entr(mean).sum(-1)
    return mean, total, aleatoric, total - aleatoric


def shipped(predictor: Predictor, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return [
        (stats.mean_probs, stats.total, stats.aleatoric, stats.epistemic)  # pyright: ignore[reportAttributeAccessIssue]
        for stats in (tile.stats for tile in predictor(x))
    ]


def seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def compare(
    name: str,
    architecture: Architecture,
    inputs: InputSpec,
    num_members: int,
    batches: tuple[int, ...],
    turns: int,
) -> bool:
    target = TargetSpec(TargetKind.CLASS, classes=("0", "1"))
    artefact = make_artefact(architecture, inputs, Categorical(), target, num_members, Atoms.of_stack, 1)
    networks = []
    for draws in artefact.posterior.draw(chunk_size=1):
        network = architecture.network(inputs, 2)
        weights = artefact.layout.unflatten(draws.flat[0])
        network.load_state_dict({**weights, **{key: value[0] for key, value in draws.buffers.items()}})
        networks.append(network.eval())
    predictor = Predictor(artefact, executor="measured")
    good = True
    for batch in batches:
        x = torch.randn(batch, *inputs.shape, generator=torch.Generator().manual_seed(0))
        mean = torch.cat([one[0] for one in shipped(predictor, x)])
        torch.testing.assert_close(mean.float(), plain_loop(networks, x)[0], rtol=1e-4, atol=1e-5)
        once = seconds(lambda x=x: plain_loop(networks, x), 1)
        repeats = max(1, int(0.05 / once))
        times = [
            (
                seconds(lambda x=x: shipped(predictor, x), repeats),
                seconds(lambda x=x: plain_loop(networks, x), repeats),
            )
            for _ in range(turns)
        ]
        ours, plain = (min(column) for column in zip(*times, strict=True))
        ratio = statistics.median(other / own for own, other in times)
        least = LEAST_SPEED if num_members >= 100 else LEAST_SPEED - NOISE
        if num_members >= 100 and batch == 1:
            least = LEAST_SPEED_OF_ONE
        good &= row(
            f"{name}, {num_members} members, batch {batch}",
            f"{1e3 * plain:9.2f} ms",
            f"{1e3 * ours:9.2f} ms",
            ratio,
            least,
            at_most=False,
        )
    return good


def row(what: str, one: str, other: str, ratio: float, limit: float, *, at_most: bool) -> bool:
    passed = ratio <= limit if at_most else ratio >= limit
    sign = "≤" if at_most else "≥"
    print(
        f"{what:42} {one:>12} {other:>12} {ratio:8.2f}x  {sign} {limit:g}x  {'ok' if passed else 'MISSED'}",
        flush=True,
    )
    return passed


# --- memory ---------------------------------------------------------------------------------------------------


def swag_like(stack: Stack) -> list[MemberPosterior]:
    generator = torch.Generator().manual_seed(0)
    members = []
    for mean in stack.flat:
        deviations = 0.01 * torch.randn(20, len(mean), generator=generator)
        members.append(LowRankGaussian(mean, torch.full_like(mean, 1e-4), deviations, {}))
    return members


def peak_mib() -> float:
    """Of this process since it began; `ru_maxrss` would count its parent before the exec, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def one_pass(kind: str, num_samples: int, num_rows: int) -> None:
    """In a process of its own: print the peak before the pass and after it, MiB."""
    torch.set_num_threads(1)
    inputs, architecture = InputSpec((64,)), Mlp(hidden=[128, 128], activation="relu", dropout=0.0)
    if kind == "classes":
        likelihood = Categorical()
        target = TargetSpec(TargetKind.CLASS, classes=tuple("abcdefghij"))
        y = torch.arange(num_rows) % 10
    else:
        likelihood = HeteroscedasticGaussian(min_std=1e-3)
        target = TargetSpec(TargetKind.CONTINUOUS)
        y = torch.zeros(num_rows)
    artefact = make_artefact(architecture, inputs, likelihood, target, 1, swag_like, num_samples)
    x = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0))
    before = peak_mib()
    total = 0.0
    for tile in Predictor(artefact)(x, y):
        total += float(tile.stats.nll.sum())
        if tile.mixture is not None:
            total += float(tile.mixture.quantile(torch.tensor([0.025, 0.975])).sum())
    assert math.isfinite(total)
    print(before, peak_mib())


def memory(kind: str, num_rows: int) -> bool:
    peaks = []
    for num_samples in (FEWER_SAMPLES, SAMPLES):
        command = [sys.executable, str(Path(__file__)), "--pass", kind, str(num_samples), str(num_rows)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks.append([float(word) for word in out.split()])
    (fewer_before, fewer), (more_before, more) = peaks
    print(
        f"  of which the pass itself adds {fewer - fewer_before:.0f} MiB with {FEWER_SAMPLES} samples, "
        f"{more - more_before:.0f} MiB with {SAMPLES}:"
    )
    name = f"peak memory, {kind}, {num_rows} rows"
    return row(name, f"{fewer:.0f} MiB", f"{more:.0f} MiB", more / fewer, MOST_MEMORY, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns and rows: half a minute")
    parser.add_argument("--pass", nargs=3, dest="one_pass", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_pass:
        kind, num_samples, num_rows = args.one_pass
        one_pass(kind, int(num_samples), int(num_rows))
        return 0
    torch.set_num_threads(1)
    turns = 3 if args.quick else 9
    print(f"{'speed':42} {'plain loop':>12} {'bdl_train':>12} {'ratio':>9}")
    mlp = Mlp(hidden=[50], activation="relu", dropout=0.0)
    good = compare("13→50→2", mlp, InputSpec((13,)), 100, BATCHES, turns)
    if not args.quick:
        good &= compare("13→50→2", mlp, InputSpec((13,)), 5, BATCHES, turns)
        lenet = LeNet(activation="relu", dropout=0.0)
        good &= compare("LeNet 28×28", lenet, InputSpec((1, 28, 28)), 5, BATCHES[:3], turns)
    print(f"\n{'memory':42} {f'{FEWER_SAMPLES} samples':>12} {f'{SAMPLES} samples':>12} {'ratio':>9}")
    for kind in ("classes", "numbers"):
        good &= memory(kind, 512 if args.quick else 4096)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
