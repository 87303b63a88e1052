"""Any `nn.Module` as a model, by its `_target_`."""

import itertools
import sys

import pytest
import torch

from bdl_train.build import allowing
from bdl_train.errors import UsageError
from bdl_train.models import ModuleArchitecture, architecture_from
from bdl_train.models.mlp import Mlp
from bdl_train.specs import InputSpec
from bdl_train.stack import StackedNetwork, build_stack

torch.set_num_threads(1)

SPEC = InputSpec((3,), (1, 1, 1))
SEQUENTIAL = {
    "_target_": "torch.nn.Sequential",
    "_args_": [
        {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 4},
        {"_target_": "torch.nn.Tanh"},
        {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2},
    ],
}

USER_CODE = """
import torch
from torch import nn

class Attends(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        width = self.token.shape[-1]
        tokens = torch.cat([self.token.expand(len(x), 1, width), x[..., None].expand(-1, -1, width)], 1)
        return self.head(self.attention(tokens, tokens, tokens)[0][:, 0])

class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None

class Plain:
    pass
"""


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    (tmp_path / "a_users_networks.py").write_text(USER_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_users_networks"
    sys.modules.pop("a_users_networks", None)


def test_a_shipped_target_becomes_its_dataclass():
    node = {"_target_": "bdl_train.models.mlp.Mlp", "hidden": [4], "activation": "relu", "dropout": 0.0}
    assert architecture_from(node) == Mlp(hidden=[4], activation="relu", dropout=0.0)


def test_a_module_is_built_from_nested_nodes():
    architecture = architecture_from(SEQUENTIAL)
    assert isinstance(architecture, ModuleArchitecture)
    architecture.check(SPEC)
    network = architecture.network(SPEC, 2)
    assert [tuple(value.shape) for value in network.parameters()] == [(4, 3), (4,), (2, 4), (2,)]
    assert network.training


def test_members_of_a_users_module_differ_in_projections_and_tokens_and_follow_their_seeds(user_package):
    node = {"_target_": f"{user_package}.Attends", "width": 4}
    with allowing([user_package]):
        architecture = architecture_from(node)
        template, stack = build_stack(lambda: architecture.network(SPEC, 2), [3, 4, 5, 3])
    for name in ("token", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"):
        for i, j in itertools.combinations(range(3), 2):
            assert not torch.equal(stack.params[name][i], stack.params[name][j]), name
    assert torch.equal(stack.flat[0], stack.flat[3])
    outputs, _ = StackedNetwork(template, "vmap")(stack.params, {}, torch.ones(4, 6, 3), train=True)
    assert outputs.shape == (4, 6, 2)


def test_a_lazy_module_learns_its_input_width_from_the_check():
    node = {"_target_": "torch.nn.LazyLinear", "out_features": 2}
    _, stack = build_stack(lambda: architecture_from(node).network(SPEC, 2), [1, 2])
    assert stack.layout.shapes == ((2, 3), (2,))
    assert not torch.equal(stack.flat[0], stack.flat[1])


def test_the_check_leaves_batch_statistics_and_the_generator_alone():
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "torch.nn.BatchNorm1d", "num_features": 3},
            {"_target_": "torch.nn.Dropout"},
            {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2},
        ],
    }
    torch.manual_seed(0)
    network = architecture_from(node).network(SPEC, 2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.nn.Linear(3, 2)
    assert torch.equal(torch.get_rng_state(), after)
    buffers = dict(network.named_buffers())
    assert int(buffers["0.num_batches_tracked"]) == 0
    assert torch.equal(buffers["0.running_var"], torch.ones(3))


def test_outputs_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(UsageError, match=r"shape \[2, 5\].*likelihood asks for 5 outputs.*gave \[2, 2\]"):
        architecture_from(SEQUENTIAL).network(SPEC, 5)


def test_an_input_that_the_module_refuses_is_named_with_torchs_words():
    with pytest.raises(UsageError, match=r"float32 batch of shape \[2, 7\].*cannot be multiplied"):
        architecture_from(SEQUENTIAL).network(InputSpec((7,)), 2)


def test_outputs_that_are_no_tensor_are_refused(user_package):
    node = {"_target_": f"{user_package}.Tuple", "in_features": 3, "out_features": 2}
    with allowing([user_package]), pytest.raises(UsageError, match="gave tuple"):
        architecture_from(node).network(SPEC, 2)


def test_unknown_arguments_are_refused():
    node = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2, "widht": 4}
    with pytest.raises(UsageError, match=r"model.*widht"):
        architecture_from(node).network(SPEC, 2)


def test_targets_outside_the_allow_list_or_of_another_kind_are_refused(user_package):
    with pytest.raises(UsageError, match="outside the allowed packages"):
        architecture_from({"_target_": f"{user_package}.Attends", "width": 4})
    with (
        allowing([user_package]),
        pytest.raises(UsageError, match=r"derives from .*Architecture or .*Module"),
    ):
        architecture_from({"_target_": f"{user_package}.Plain"})
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.system", "command": "true"}]}
    with pytest.raises(UsageError, match=r"os\.system"):
        architecture_from(nested).network(SPEC, 2)


@pytest.mark.parametrize("node", [{"hidden": [3]}, None, "mlp"])
def test_a_node_without_target_is_refused(node):
    with pytest.raises(UsageError, match="model must be a mapping with a '_target_'"):
        architecture_from(node)
