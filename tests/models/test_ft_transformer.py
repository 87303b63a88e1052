"""FT-Transformer against torch's own attention and a token-by-token tokenizer."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.models.ft_transformer import FeatureTokenizer, FtTransformer, Network
from bdl_train.specs import InputSpec

torch.set_num_threads(1)

SPEC = InputSpec((7,), (1, 2, 3, 1), ("age", "income", "city", "height"))
SMALL = FtTransformer(
    width=12,
    num_heads=3,
    num_blocks=3,
    ffn_width=16,
    attention_dropout=0.0,
    ffn_dropout=0.0,
    residual_dropout=0.0,
)


def test_a_token_is_the_sum_over_the_columns_of_its_feature():
    tokenizer = FeatureTokenizer(SPEC.groups, 5).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    tokens = tokenizer(x)
    assert tokens.shape == (4, 5, 5)
    weight, bias, cls = tokenizer.weight, tokenizer.bias, tokenizer.cls[0]
    columns = [[0], [1, 2], [3, 4, 5], [6]]
    for b in range(4):
        torch.testing.assert_close(tokens[b, 0], cls)
        for j, own in enumerate(columns):
            expected = bias[j].clone()
            for d in own:
                expected = expected + x[b, d] * weight[d]
            torch.testing.assert_close(tokens[b, j + 1], expected)


def test_a_category_is_looked_up_in_a_table():
    tokenizer = FeatureTokenizer((4,), 6)
    one_hot = torch.eye(4)
    torch.testing.assert_close(tokenizer(one_hot)[:, 1], tokenizer.weight + tokenizer.bias)
    # A level never seen in training is all zeros: the bias alone.
    torch.testing.assert_close(tokenizer(torch.zeros(1, 4))[:, 1], tokenizer.bias)


def reference(weights: dict[str, Tensor], tokens: Tensor, settings: FtTransformer) -> Tensor:
    """The paper's equations with `nn.MultiheadAttention`, every token computed in every block."""
    E = settings.width

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, [E], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for i in range(settings.num_blocks):
        own = f"blocks.{i}.attention"
        attention = nn.MultiheadAttention(E, settings.num_heads, batch_first=True, dtype=tokens.dtype)
        packed = [weights[f"{own}.{part}.weight"] for part in ("query", "key", "value")]
        biases = [weights[f"{own}.query.bias"], tokens.new_zeros(E), weights[f"{own}.value.bias"]]
        attention.load_state_dict(
            {
                "in_proj_weight": torch.cat(packed),
                "in_proj_bias": torch.cat(biases),
                "out_proj.weight": weights[f"{own}.out.weight"],
                "out_proj.bias": weights[f"{own}.out.bias"],
            }
        )
        h = tokens if i == 0 else norm(tokens, f"blocks.{i}.attention_norm")
        tokens = tokens + attention(h, h, h)[0]
        h = linear(norm(tokens, f"blocks.{i}.ffn_norm"), f"blocks.{i}.ffn.0")
        h = h[..., : settings.ffn_width] * h[..., settings.ffn_width :].relu()
        tokens = tokens + linear(h, f"blocks.{i}.ffn.3")
    return linear(norm(tokens[:, 0], "head.0").relu(), "head.2")


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_outputs_equal_those_of_torchs_attention(num_blocks):
    torch.manual_seed(0)
    settings = FtTransformer(**{**vars(SMALL), "num_blocks": num_blocks})
    network = settings.network(SPEC, 2).double()
    assert isinstance(network, Network)
    with torch.no_grad():  # norms away from their start, so that a missing one shows
        for value in network.parameters():
            value.add_(0.3 * torch.randn_like(value))
    x = torch.randn(5, 7, dtype=torch.float64)
    expected = reference(dict(network.named_parameters()), network.tokenizer(x), settings)
    torch.testing.assert_close(network(x), expected)


def test_parameter_count_of_the_papers_defaults_for_100_numbers():
    # Tokens 2·100·192 and the class token's 192; in each of 3 blocks 4·192² + 3·192 for attention,
    # 192·512 + 512 + 256·192 + 192 for the feed-forward part and 4·192 for two norms, less 2·192 for the norm
    # left out; head 2·192 + 192 + 1.
    settings = FtTransformer(
        width=192,
        num_heads=8,
        num_blocks=3,
        ffn_width=256,
        attention_dropout=0.2,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    )
    with torch.device("meta"):
        network = settings.network(InputSpec((100,), (1,) * 100), 1)
    assert sum(value.numel() for value in network.parameters()) == 929_665


def test_a_table_without_groups_has_one_feature_a_column():
    with_groups = SMALL.network(InputSpec((3,), (1, 1, 1)), 2)
    without = SMALL.network(InputSpec((3,)), 2)
    assert with_groups.state_dict().keys() == without.state_dict().keys()
    without.load_state_dict(with_groups.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(without(x), with_groups(x))


def test_tokens_start_uniform_in_the_papers_bounds():
    torch.manual_seed(0)
    tokenizer = FeatureTokenizer((1,) * 500, 16)
    for value in tokenizer.parameters():
        assert value.abs().max().item() <= 0.25
    assert tokenizer.weight.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.03)


def test_each_dropout_setting_is_used():
    x = torch.randn(3, 7)
    for name in ("attention_dropout", "ffn_dropout", "residual_dropout"):
        torch.manual_seed(0)
        network = FtTransformer(**{**vars(SMALL), name: 0.5}).network(SPEC, 2)
        plain = SMALL.network(SPEC, 2)
        plain.load_state_dict(dict(network.named_parameters()))
        torch.testing.assert_close(network.eval()(x), plain(x))
        network.train()
        assert not torch.allclose(network(x), network(x)), name


def test_a_width_that_its_heads_do_not_divide_is_refused():
    node = {"_target_": "bdl_train.models.ft_transformer.FtTransformer", **vars(SMALL), "num_heads": 5}
    with pytest.raises(UsageError, match="multiple of num_heads=5, got 12"):
        build(node, FtTransformer, key="model")


def test_images_are_refused():
    with pytest.raises(UsageError, match=r"takes table examples.*image examples of shape \[1, 28, 28\]"):
        SMALL.check(InputSpec((1, 28, 28)))
