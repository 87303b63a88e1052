"""Every shipped method, with settings under which it ends within a few steps of a small problem."""

from typing import Any

from tiny_problems import CONF, node_of

from bdl_train.build import build, resolve
from bdl_train.inference import Method

NAMES = sorted(path.stem for path in (CONF / "inference").glob("*.yaml"))
SMALL: dict[str, dict[str, Any]] = {
    "laplace": {"structure": "kfac"},
    "mclmc": {"num_warmup": 40, "num_draws": 3, "thin": 3},
    "snapshot": {"num_cycles": 3, "num_draws": 2},
    "hmc": {"num_warmup": 20, "num_draws": 3, "thin": 2, "num_leapfrog": 2, "target_accept": 0.9},
    "sgld": {"num_draws": 3, "burn_in_epochs": 1},
    "sghmc": {"num_draws": 3, "burn_in_epochs": 1},
    "cyclical_sgmcmc": {"num_draws": 2, "num_cycles": 2, "exploration": 0.5},
}


def class_of(name: str) -> type[Method[Any]]:
    return resolve(node_of("inference", name)["_target_"], Method, key="inference")  # pyright: ignore


def small_node(name: str, **changed: Any) -> dict[str, Any]:
    """The shipped config with few steps."""
    return {**node_of("inference", name), **SMALL.get(name, {}), **changed}


def shipped(name: str, **changed: Any) -> Method[Any]:
    """The method with few steps."""
    return build(small_node(name, **changed), Method, key="inference")
