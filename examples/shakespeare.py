# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer that reads a text byte by byte and predicts the next one.

    distbelief train examples/shakespeare.py --text tinyshakespeare.txt

Any text file will do; Shakespeare's plays are data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn.
"""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distbelief as db


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each added to its input of shape (batch, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mix, self.join = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        x = x + self.feed(self.feed_norm(x))
        return x


class Decoder(nn.Module):
    """Bytes, shape (batch, length), to scores of the byte that follows each, shape (batch, length, 256)."""

    def __init__(self, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.score = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, text: Tensor) -> Tensor:
        scores: Tensor = self.score(self.blocks(self.byte(text) + self.position.weight[: text.shape[1]]))
        return scores


def windows(text: str, length: int, test: bool) -> TensorDataset:
    """The text in windows of `length` bytes and the byte that follows each; the last tenth is for testing."""
    data = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8).long()
    data = data[len(data) * 9 // 10 :] if test else data[: len(data) * 9 // 10]
    cut = data.unfold(0, length + 1, length)
    return TensorDataset(cut[:, :-1], cut[:, 1:])


def bits_per_byte(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten()) / math.log(2)


def job(text: str | None = None, length: int = 128, width: int = 128, layers: int = 2) -> db.Job:
    if text is None or not Path(text).is_file():
        raise db.ConfigurationError(f"no text file at --text {text}", hint=str(__doc__))
    return db.Job(
        model=functools.partial(Decoder, length, width, layers),
        loss=bits_per_byte,
        data=functools.partial(windows, text, length, test=False),
        test=functools.partial(windows, text, length, test=True),
        metrics={"bits_per_byte": bits_per_byte},
        algorithm=db.Downpour(update_rule=db.adamw(1e-3)),
        epochs=5,
    )


if __name__ == "__main__":
    db.main(job)
