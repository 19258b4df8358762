"""A small byte-level GPT with dropout, cut into shards by FSDP2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from snapshotd_client.demo.corpus import VOCABULARY


@dataclass(frozen=True)
class Shape:
    """Size of the model: about 3.2 million parameters, 39 MB of training state with AdamW."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 64
    dropout: float = 0.1


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer, each with dropout."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.norm2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.out(self._attend(self.norm1(x))))
        fed: Tensor = self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return x + fed

    def _attend(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        split = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, context, width)


class Gpt(nn.Module):
    """Bytes in, logits of the next byte out; the output layer is tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(_start_small)
        self.head.weight = self.bytes.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, context, 256) for int64 tokens of shape (batch, context)."""
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _start_small(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def sharded_gpt(shape: Shape, mesh: DeviceMesh, seed: int) -> Gpt:
    """Build the same model on every rank and keep this rank's part of each parameter."""
    torch.manual_seed(seed)
    model = Gpt(shape)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
