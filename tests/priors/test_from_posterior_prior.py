import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Generator, Tensor

from bdl_train.errors import UsageError
from bdl_train.priors.from_posterior import FromPosterior
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)
TODAY = Layout(("w", "b"), ((2, 1), (1,)))
# The likelihood's own parameter stands in the middle, so that skipping it is seen.
STORED = Layout(("w", "likelihood.log_noise_std", "b"), ((2, 1), (), (1,)))
MEAN = torch.tensor([[1.0, 2.0, 77.0, 3.0], [5.0, 4.0, 88.0, 3.0]])
VAR = torch.tensor([[0.25, 1.0, 99.0, 4.0], [0.5, 0.0, 99.0, 1.0]])

WriteRun = Callable[[Layout, Tensor, Tensor], Path]


def prior(run: Path, **changed: Any) -> FromPosterior:
    return FromPosterior(
        **{"run": str(run), "moments": "pooled", "tempering": 1.0, "min_std": 1e-3, **changed}
    )


def test_per_member_gives_member_i_the_moments_of_i_mod_m(write_run: WriteRun):
    bound = prior(write_run(STORED, MEAN, VAR), moments="per_member").bind(TODAY, [3, 0, 4])
    assert bound.mean.tolist() == [[5.0, 4.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    expected = [[math.sqrt(0.5), 1e-3, 1.0], [0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]
    torch.testing.assert_close(bound.std, torch.tensor(expected))


def test_pooled_is_the_mixture_over_members(write_run: WriteRun):
    bound = prior(write_run(STORED, MEAN, VAR)).bind(TODAY, [3, 0, 4])
    assert bound.mean.tolist() == [3.0, 3.0, 3.0]
    # Mean of variances + population variance of means, by hand.
    torch.testing.assert_close(bound.std.square(), torch.tensor([0.375 + 4, 0.5 + 1, 2.5 + 0]))


def test_tempering_divides_the_variance_and_the_floor_comes_last(write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    full, quarter = prior(run).bind(TODAY, [0]), prior(run, tempering=0.25).bind(TODAY, [0])
    torch.testing.assert_close(quarter.std, 2 * full.std)
    torch.testing.assert_close(quarter.mean, full.mean)
    floored = prior(run, tempering=0.25, min_std=3.0).bind(TODAY, [0])
    torch.testing.assert_close(floored.std, torch.tensor([math.sqrt(4.375 * 4), 3.0, math.sqrt(10)]))


def test_density_is_scipys(write_run: WriteRun):
    bound = prior(write_run(STORED, MEAN, VAR), moments="per_member", min_std=0.1).bind(TODAY, [0, 1])
    flat = RNG.normal(size=(2, 3))
    expected = scipy.stats.norm.logpdf(flat, bound.mean.double(), bound.std.double()).sum(-1)
    np.testing.assert_allclose(
        bound.to("cpu", torch.float64).log_prob(torch.tensor(flat)), expected, rtol=1e-12
    )
    assert bound.sample(4, Generator().manual_seed(0)).shape == (4, 2, 3)


def test_moments_of_draws_are_yesterdays(write_run: WriteRun):
    bound = prior(write_run(STORED, MEAN, VAR)).bind(TODAY, [0])
    draws = bound.sample(40_000, Generator().manual_seed(0)).double().numpy()
    std = np.sqrt([4.375, 1.5, 2.5])
    # Five standard errors of a mean and of a variance.
    assert (np.abs(draws.mean(0) - 3.0) < 5 * std / np.sqrt(40_000)).all()
    np.testing.assert_allclose(draws.var(0), std**2, rtol=5 * math.sqrt(2 / 40_000))


def test_half_precision_moments_are_computed_with_in_full_precision(write_run: WriteRun):
    # 50,000 / 0.25 is more than float16 can hold.
    mean, var = torch.zeros(2, 3, dtype=torch.float16), torch.full((2, 3), 5e4, dtype=torch.float16)
    for moments in ("pooled", "per_member"):
        bound = prior(write_run(TODAY, mean, var), moments=moments, tempering=0.25).bind(TODAY, [0])
        torch.testing.assert_close(bound.std.flatten(), torch.full((3,), math.sqrt(2e5)), rtol=1e-3, atol=0)


def test_per_member_refuses_members_that_are_single_points(write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR * torch.tensor([[1.0], [0.0]]))
    with pytest.raises(UsageError, match=r"members \[1\].*Use prior\.moments=pooled"):
        prior(run, moments="per_member").bind(TODAY, [0])
    # A variance of the likelihood's parameter alone is no spread of the network.
    run = write_run(STORED, MEAN, torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 2))
    with pytest.raises(UsageError, match=r"members \[0, 1\].*Use prior\.moments=pooled"):
        prior(run, moments="per_member").bind(TODAY, [0])
    assert prior(run).bind(TODAY, [0]).std[0].item() == 2.0


def test_one_point_alone_is_refused_when_pooled(write_run: WriteRun):
    run = write_run(STORED, MEAN[:1], torch.zeros(1, 4))
    with pytest.raises(UsageError, match=r"one single point \(1 member\(s\)\)"):
        prior(run).bind(TODAY, [0])


@pytest.mark.parametrize(
    ("today", "named"),
    [
        (Layout(("w", "b"), ((3, 1), (1,))), "there 'w' [2, 1], today 'w' [3, 1]"),
        (Layout(("w", "c"), ((2, 1), (1,))), "there 'b' [1], today 'c' [1]"),
        (Layout(("w",), ((2, 1),)), "there 'b' [1], today none"),
        (Layout(("w", "b", "c"), ((2, 1), (1,), (4,))), "there none, today 'c' [4]"),
    ],
)
def test_another_network_is_refused_with_the_first_difference(today: Layout, named: str, write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    with pytest.raises(UsageError, match=re.escape(named)) as caught:
        prior(run).bind(today, [0])
    assert f"prior.run={run}" in str(caught.value)


def test_a_missing_run_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"prior\.run=.*nowhere is not a run with a posterior"):
        prior(tmp_path / "nowhere").bind(TODAY, [0])


def test_missing_moments_are_refused(write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    (run / "posterior" / "moments.safetensors").unlink()
    with pytest.raises(UsageError, match=r"cannot read posterior/moments\.safetensors"):
        prior(run).bind(TODAY, [0])


def test_changed_moments_are_refused(write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    path = run / "posterior" / "moments.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="was changed after it was written"):
        prior(run).bind(TODAY, [0])


@pytest.mark.parametrize(
    "header",
    [
        "not json",
        "[]",
        "{}",
        '{"layout": {"names": [], "shapes": [[1]]}, "files": {"moments.safetensors": {"sha256": ""}}}',
        '{"layout": {"names": ["w"], "shapes": [["x"]]}, "files": {"moments.safetensors": {"sha256": ""}}}',
        '{"layout": {"names": ["w"], "shapes": [[1]]}, "files": {}}',
    ],
)
def test_an_unreadable_header_is_refused(header: str, write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    (run / "posterior" / "posterior.json").write_text(header)
    with pytest.raises(UsageError, match=r"posterior/posterior\.json is unreadable"):
        prior(run).bind(TODAY, [0])


@pytest.mark.parametrize(
    ("mean", "var", "message"),
    [
        (MEAN[:, :3], VAR[:, :3], r"shape \[M, 4\], got \[2, 3\] and \[2, 3\]"),
        (MEAN, VAR[:1], r"shape \[M, 4\], got \[2, 4\] and \[1, 4\]"),
        (MEAN[:0], VAR[:0], r"got \[0, 4\] and \[0, 4\]"),
        (MEAN[0], VAR[0], r"got \[4\] and \[4\]"),
        (MEAN, -VAR, "a variance is negative"),
        (MEAN * math.nan, VAR, "not finite"),
    ],
)
def test_numbers_that_are_no_moments_are_refused(
    mean: Tensor, var: Tensor, message: str, write_run: WriteRun
):
    run = write_run(STORED, mean.clone(), var.clone())
    with pytest.raises(UsageError, match=message):
        prior(run).bind(TODAY, [0])


def test_a_file_without_moments_is_refused(write_run: WriteRun):
    run = write_run(STORED, MEAN, VAR)
    path, header = run / "posterior" / "moments.safetensors", run / "posterior" / "posterior.json"
    path.write_bytes(b"no tensors")
    stored = json.loads(header.read_text())
    stored["files"]["moments.safetensors"]["sha256"] = hashlib.sha256(b"no tensors").hexdigest()
    header.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="holds no mean and var"):
        prior(run).bind(TODAY, [0])
