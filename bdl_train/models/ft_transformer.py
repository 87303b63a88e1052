"""FT-Transformer: a transformer over the features of a table.

Shape letters: B batch, D input columns, F original features, T tokens (F + 1), Q queries, E token width,
H heads.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bdl_train.models import Architecture
from bdl_train.models._dropout import make_dropout
from bdl_train.specs import InputSpec


@dataclass(frozen=True, kw_only=True)
class FtTransformer(Architecture):
    """Each feature becomes a token, pre-norm blocks mix them, and the class token is read out.

    Source:
        Gorishniy et al. (2021), arXiv:2106.11959, Section 3.3 and Appendix E. As there, the first block has
        no norm in front of its attention, and the last block computes the class token only. Keys have no
        bias, which changes no output.

    Attributes:
        width: E, of a token; a multiple of `num_heads`.
        num_heads: H.
        num_blocks: Attention and feed-forward pairs.
        ffn_width: Hidden units of the feed-forward part, after its gate.
        attention_dropout: Rate on the attention weights.
        ffn_dropout: Rate on the hidden units of the feed-forward part.
        residual_dropout: Rate on what a block adds to its tokens.
    """

    width: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]
    num_blocks: Annotated[int, Field(ge=1)]
    ffn_width: Annotated[int, Field(ge=1)]
    attention_dropout: Annotated[float, Field(ge=0, lt=1)]
    ffn_dropout: Annotated[float, Field(ge=0, lt=1)]
    residual_dropout: Annotated[float, Field(ge=0, lt=1)]

    takes: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        if self.width % self.num_heads != 0:
            raise ValueError(f"width must be a multiple of num_heads={self.num_heads}, got {self.width}.")

    def network(self, inputs: InputSpec, num_outputs: int) -> nn.Module:
        return Network(self, inputs, num_outputs)


class Network(nn.Module):
    """`[B, D]` to `[B, num_outputs]`."""

    def __init__(self, settings: FtTransformer, inputs: InputSpec, num_outputs: int) -> None:
        super().__init__()
        # A table whose features are not described has one number a column.
        groups = inputs.groups or (1,) * inputs.shape[0]
        self.tokenizer = FeatureTokenizer(groups, settings.width)
        self.blocks = nn.ModuleList(Block(settings, first=i == 0) for i in range(settings.num_blocks))
        self.head = nn.Sequential(
            nn.LayerNorm(settings.width), nn.ReLU(), nn.Linear(settings.width, num_outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens_BTE = self.tokenizer(x)
        num_tokens = tokens_BTE.shape[1]
        for i, block in enumerate(self.blocks, start=1):
            tokens_BTE = block(tokens_BTE, num_queries=1 if i == len(self.blocks) else num_tokens)
        return self.head(tokens_BTE[:, 0])


class FeatureTokenizer(nn.Module):
    """`[B, D]` to `[B, T, E]`: the class token, then for each feature Σ x_d W_d + b over its columns d.

    With one column this is the paper's numerical token x W + b; with a one-hot category, a row of the
    embedding table W plus b.

    Args:
        groups: Columns of each feature; they sum to D.
        width: E.
    """

    def __init__(self, groups: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(sum(groups), width))
        self.bias = nn.Parameter(torch.empty(len(groups), width))
        # Two axes, like the others, so that a prior scaled by fan-in gives all tokens one scale.
        self.cls = nn.Parameter(torch.empty(1, width))
        bound = 1 / math.sqrt(width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        columns = zip(x.split(self.groups, -1), self.weight.split(self.groups, 0), strict=True)
        features_BFE = torch.stack([x_BG @ weight_GE for x_BG, weight_GE in columns], dim=1) + self.bias
        return torch.cat([self.cls.expand(len(x), 1, -1), features_BFE], dim=1)


class Block(nn.Module):
    """Attention over the tokens, then a feed-forward part on each, both pre-norm with a residual."""

    def __init__(self, settings: FtTransformer, *, first: bool) -> None:
        super().__init__()
        self.attention_norm = nn.Identity() if first else nn.LayerNorm(settings.width)
        self.attention = Attention(settings.width, settings.num_heads, settings.attention_dropout)
        self.ffn_norm = nn.LayerNorm(settings.width)
        self.ffn = nn.Sequential(
            nn.Linear(settings.width, 2 * settings.ffn_width),
            ReGlu(),
            make_dropout(settings.ffn_dropout),
            nn.Linear(settings.ffn_width, settings.width),
        )
        self.attention_out = make_dropout(settings.residual_dropout)
        self.ffn_out = make_dropout(settings.residual_dropout)

    def forward(self, tokens_BTE: Tensor, num_queries: int) -> Tensor:
        """`[B, T, E]` to `[B, num_queries, E]`, the first tokens."""
        normed_BTE = self.attention_norm(tokens_BTE)
        tokens_BQE = tokens_BTE[:, :num_queries]
        tokens_BQE = tokens_BQE + self.attention_out(self.attention(normed_BTE[:, :num_queries], normed_BTE))
        return tokens_BQE + self.ffn_out(self.ffn(self.ffn_norm(tokens_BQE)))


class Attention(nn.Module):
    """Multi-head attention softmax(Q Kᵀ / √(E/H)) V, written out so that it has a batching rule."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        # A bias of the keys adds the same number to all scores of a query, and the softmax ignores it.
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = make_dropout(dropout)

    def forward(self, queries_BQE: Tensor, tokens_BTE: Tensor) -> Tensor:
        query = self._heads(self.query(queries_BQE))
        key = self._heads(self.key(tokens_BTE))
        value = self._heads(self.value(tokens_BTE))
        scores_BHQT = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        mixed = self.dropout(scores_BHQT.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x_BTE: Tensor) -> Tensor:
        """`[B, T, E]` to `[B, H, T, E/H]`."""
        return x_BTE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ReGlu(nn.Module):
    """a · relu(b) of the two halves a, b of the last axis (Shazeer, 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * gate.relu()
