import math

import pytest

from bdl_train.schedulers.constant import Constant
from bdl_train.schedulers.cosine import Cosine


def factors(warmup_fraction: float, final_factor: float, num_steps: int) -> list[float]:
    schedule = Cosine(warmup_fraction=warmup_fraction, final_factor=final_factor)
    return [schedule.factor(step, num_steps) for step in range(num_steps)]


def test_five_steps_by_hand():
    root_half = math.sqrt(0.5)
    expected = [1.0, (1 + root_half) / 2, 0.5, (1 - root_half) / 2, 0.0]
    assert factors(0.0, 0.0, 5) == pytest.approx(expected)
    assert factors(0.0, 0.2, 5) == pytest.approx([0.2 + 0.8 * factor for factor in expected])


def test_warm_up_is_linear_and_the_cosine_follows():
    warm = factors(0.4, 0.1, 10)
    assert warm[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert warm[4:] == pytest.approx(factors(0.0, 0.1, 6))


@pytest.mark.parametrize("warmup_fraction", [0.07, 0.29, 0.55, 0.57, 0.58])
def test_warm_up_takes_its_share_of_the_steps(warmup_fraction: float):
    # 0.29 * 100 is 28.999… in floating point.
    num_warm = next(step for step, factor in enumerate(factors(warmup_fraction, 0.0, 100)) if factor == 1) + 1
    assert num_warm == round(100 * warmup_fraction)


def test_constant_is_one():
    assert [Constant().factor(step, 3) for step in range(3)] == [1.0, 1.0, 1.0]
