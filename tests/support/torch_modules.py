"""Small PyTorch modules for tests of exporting: with examples, and their free axes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Tensor = torch.Tensor


class Mlp(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down_proj(self.act(self.up_proj(x)))
        return y


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.conv2(functional.relu(self.bn1(self.conv1(x)))))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.grow = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 10)

    def forward(self, image: Tensor) -> Tensor:
        y = self.grow(self.blocks(functional.relu(self.stem(image))))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def heads_of(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        q, k, v = (heads_of(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, 4)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        return y


class TiedLm(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(layers)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(x)
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x)[0])
        return y


@dataclass(frozen=True)
class Case:
    """A module, one call of it, its free axes, and the nodes that hold its weights."""

    module: nn.Module
    example: tuple[Tensor, ...]
    shapes: Any
    sites: tuple[str, ...]


def case(name: str) -> Case:
    """Return a case: the same weights and example for the same name."""
    torch.manual_seed(0)
    return _CASES[name]()


def _attention_sites(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{part}_proj" for part in "qkvo")


_BATCH = ({0: "batch"},)
_SEQUENCE = ({0: "batch", 1: "sequence"},)
_LM_SITES = (
    "embed_tokens",
    *(
        name
        for layer in ("layers.0", "layers.1")
        for name in (
            *_attention_sites(f"{layer}.self_attn"),
            f"{layer}.mlp.up_proj",
            f"{layer}.mlp.down_proj",
        )
    ),
    "lm_head",
)
_CNN_SITES = (
    "stem",
    *(f"blocks.{i}.conv{j}" for i in range(2) for j in (1, 2)),
    "grow",
    "head",
)
_CASES = {
    "mlp": lambda: Case(Mlp(), (torch.randn(3, 32),), _BATCH, ("up_proj", "down_proj")),
    "mlp of sequences": lambda: Case(
        Mlp(), (torch.randn(2, 5, 32),), _SEQUENCE, ("up_proj", "down_proj")
    ),
    "cnn": lambda: Case(Cnn(), (torch.randn(2, 3, 17, 17),), _BATCH, _CNN_SITES),
    "attention": lambda: Case(
        Block(32),
        (torch.randn(2, 6, 32),),
        _SEQUENCE,
        (*_attention_sites("self_attn"), "mlp.up_proj", "mlp.down_proj"),
    ),
    "lm": lambda: Case(TiedLm(), (torch.randint(0, 64, (2, 7)),), _SEQUENCE, _LM_SITES),
    "gru": lambda: Case(Recurrent(), (torch.randn(2, 6, 8),), _BATCH, ("gru", "gru", "head")),
}
