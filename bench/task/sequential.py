"""The sequential encoder: SASRec's causal transformer over item vectors, as IISAN trains it.

Learned positions, LayerNorm, then post-LN blocks (Kang & McAuley, 2018, with the normalisation of Vaswani et al.,
2017): ``x <- LN(x + Drop(Attn(x)))``, ``x <- LN(x + Drop(W_2 relu(W_1 x)))``. No bias in q, k, v and o.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.errors import UserError

LAYER_NORM_EPS = 1e-6


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.attention_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ffn_in, self.ffn_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ffn_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        b, length, dim = x.shape
        q, k, v = (
            project(x).view(b, length, self.heads, dim // self.heads).transpose(1, 2)  # (B, H, L, d/H)
            for project in (self.query, self.key, self.value)
        )
        drop = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=drop)
        mixed = self.out(mixed.transpose(1, 2).reshape(b, length, dim))
        x = self.attention_norm(x + functional.dropout(mixed, self.dropout, self.training))
        hidden = self.ffn_out(functional.relu(self.ffn_in(x)))
        normed: Tensor = self.ffn_norm(x + functional.dropout(hidden, self.dropout, self.training))
        return normed


class SequentialEncoder(nn.Module):
    """Maps the item vectors of a left-padded sequence to one user vector per position.

    Args:
        dim: width d of item and user vectors. max_seq_len: positions L. blocks, heads, dropout: of the transformer.

    Raises:
        UserError: ``dim`` is not a multiple of ``heads``.
    """

    def __init__(self, dim: int, max_seq_len: int, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"embedding_dim {dim} is not a multiple of heads {heads}; change one of them")
        self.dropout = dropout
        self.positions = nn.Parameter(torch.empty(max_seq_len, dim))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(_Block(dim, heads, dropout) for _ in range(blocks))
        nn.init.normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Encode (B, L, d) item vectors under ``mask`` (B, L), true where a slot holds an item; returns (B, L, d).

        Padded positions are never attended to, and their outputs are meaningless.
        """
        length = vectors.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=vectors.device).tril()
        # A fully masked query gives NaN in some kernels, so padded positions attend to themselves.
        visible = (causal & mask[:, None, :]) | torch.eye(length, dtype=torch.bool, device=vectors.device)
        x = functional.dropout(self.norm(vectors + self.positions[-length:]), self.dropout, self.training)
        for block in self.blocks:
            x = block(x, visible[:, None])
        return x


def init_linear(linear: nn.Linear) -> None:
    """Initialise a linear layer of the recommender: Xavier-normal weights, zero bias."""
    nn.init.xavier_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
