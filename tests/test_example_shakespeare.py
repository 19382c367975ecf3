# SPDX-License-Identifier: Apache-2.0
"""examples/shakespeare.py: the decoder sees no later byte, and the windows are the text."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import distbelief as db
from distbelief.cluster import EngineName
from distbelief.errors import ConfigurationError
from tests import problems

SHARED_TEXT = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(scope="module")
def shakespeare() -> Iterator[ModuleType]:
    with problems.example("shakespeare") as module:
        yield module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(256, (1000,), generator=torch.Generator().manual_seed(0)).tolist()))
    return path


def test_the_example_is_under_80_lines() -> None:
    assert len((problems.EXAMPLES / "shakespeare.py").read_text().splitlines()) < 80


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_changing_a_byte_changes_no_earlier_score_and_every_later_one(shakespeare: ModuleType, changed: int) -> None:
    torch.manual_seed(0)
    decoder = shakespeare.Decoder(length=16, width=32, layers=2).eval()
    text = torch.randint(256, (3, 16))
    other = text.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    with torch.no_grad():
        before, after = decoder(text), decoder(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).flatten(2).any(2).all()


def test_a_block_is_pre_norm_multi_head_attention_and_a_feed_forward_network(shakespeare: ModuleType) -> None:
    torch.manual_seed(0)
    block = shakespeare.Block(width=32, heads=4)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    assert attention.in_proj_weight is not None
    with torch.no_grad():
        attention.in_proj_weight.copy_(block.mix.weight)
        attention.in_proj_bias.copy_(block.mix.bias)
        attention.out_proj.weight.copy_(block.join.weight)
        attention.out_proj.bias.copy_(block.join.bias)
        x = torch.randn(2, 9, 32)
        normed = block.norm(x)
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
        y = x + attention(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        torch.testing.assert_close(block(x), y + block.feed(block.feed_norm(y)))


def test_each_target_is_the_byte_after_its_input(shakespeare: ModuleType, text: Path) -> None:
    content = text.read_bytes()
    for test, start, stop in ((False, 0, 900), (True, 900, 1000)):
        data = shakespeare.windows(str(text), 16, test)
        assert len(data) == (stop - start - 1) // 16
        for number, (inputs, targets) in enumerate(data):
            first = start + 16 * number
            assert bytes(inputs.tolist()) == content[first : first + 16]
            assert bytes(targets.tolist()) == content[first + 1 : first + 17]


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte(shakespeare: ModuleType) -> None:
    targets = torch.randint(256, (5, 7), generator=torch.Generator().manual_seed(0))
    assert shakespeare.bits_per_byte(torch.zeros(5, 7, 256), targets).item() == pytest.approx(8)


def test_a_plain_loop_learns_a_text_that_repeats_itself(shakespeare: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "repeats.txt"
    path.write_bytes(b"so it goes; " * 300)
    job = shakespeare.job(text=str(path), length=24, width=32, layers=1)
    inputs, targets = job.data()[:]
    torch.manual_seed(0)
    model = job.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def bits(output: Tensor, target: Tensor) -> float:
        return float(job.metrics["bits_per_byte"](output.detach(), target))

    assert bits(model(inputs), targets) > 6
    for _ in range(40):
        optimizer.zero_grad()
        job.loss(model(inputs), targets).backward()
        optimizer.step()
    test_inputs, test_targets = job.test()[:]
    with torch.no_grad():
        assert bits(model(test_inputs), test_targets) < 1


@pytest.mark.parametrize("engine", ["simulated", pytest.param("local", marks=pytest.mark.slow)])
def test_two_replicas_learn_a_text_that_repeats_itself(
    shakespeare: ModuleType, engine: EngineName, tmp_path: Path
) -> None:
    path = tmp_path / "repeats.txt"
    path.write_bytes(b"so it goes; " * 300)
    job = dataclasses.replace(
        shakespeare.job(text=str(path), length=24, width=32, layers=1), epochs=24, run=tmp_path / "run",
        cluster=db.Cluster(replicas=2, shards=2, engine=engine),
    )  # fmt: skip
    result = db.train(job, view=False)
    assert result.test["bits_per_byte"] < 2
    assert (result.summary.examples.missing, result.summary.examples.repeated) == (0, 0)


@pytest.mark.parametrize("missing", [None, "no/such/file.txt"])
def test_without_a_text_the_message_says_what_to_give(shakespeare: ModuleType, missing: str | None) -> None:
    with pytest.raises(ConfigurationError, match=r"--text(?s:.*)github\.com/karpathy/char-rnn"):
        shakespeare.job(text=missing)


def test_tiny_shakespeare_is_7842_training_and_871_test_windows_of_128_bytes(shakespeare: ModuleType) -> None:
    if not SHARED_TEXT.exists():
        pytest.skip("tiny shakespeare is not beside this checkout")
    lengths = [len(shakespeare.windows(str(SHARED_TEXT), 128, test)) for test in (False, True)]
    assert lengths == [7842, 871]
