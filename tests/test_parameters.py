# SPDX-License-Identifier: Apache-2.0
"""Laws of the flat vector: spans, layouts, and the models that cannot be one vector."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from distbelief.errors import ConfigurationError
from distbelief.parameters import Span, changed_pieces, cut, lay_out

SPANS = some.tuples(some.integers(0, 20), some.integers(0, 20)).map(lambda ends: Span(min(ends), max(ends)))


class Tied(nn.Module):
    """An output layer that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5)
        self.out.weight = self.embed.weight


def undecayed_biases(name: str, parameter: nn.Parameter) -> Mapping[str, float]:
    return {"weight_decay": 0.0} if name.endswith("bias") else {}


def normed(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.mark.parametrize("shards", range(1, 65))
def test_spans_cover_every_parameter_once_and_differ_by_at_most_one_percent(shards: int) -> None:
    for length in (100 * shards, 100 * shards + 1, 101 * shards - 1, 12_345_677):
        spans = cut(length, shards)
        assert [spans[0].start, spans[-1].stop] == [0, length]
        assert all(left.stop == right.start for left, right in pairwise(spans))
        assert max(len(span) for span in spans) / (length / shards) <= 1.01


@settings(deadline=None)
@given(some.integers(1, 64), some.integers(0, 400))
def test_no_span_is_empty_while_there_are_enough_parameters(shards: int, more: int) -> None:
    spans = cut(shards + more, shards)
    assert [position for span in spans for position in range(span.start, span.stop)] == list(range(shards + more))
    assert len(spans) == shards
    assert min(len(span) for span in spans) >= 1


@settings(deadline=None)
@given(SPANS, SPANS)
def test_the_overlap_of_spans_is_the_intersection_of_their_positions(one: Span, other: Span) -> None:
    both = one.overlap(other)
    positions = set(range(one.start, one.stop)) & set(range(other.start, other.stop))
    assert set(range(both.start, both.stop)) == positions
    assert len(both) == len(positions)
    if positions:
        assert list(range(one.start, one.stop))[both.within(one)] == sorted(positions)


def test_pieces_lie_one_after_another_and_groups_together() -> None:
    module = normed(6)
    layout = lay_out(module, undecayed_biases)
    assert layout.length == sum(parameter.numel() for parameter in module.parameters())
    edges = [edge for piece in layout.pieces for edge in (piece.span.start, piece.span.stop)]
    assert edges == sorted(edges)
    assert edges[0] == 0
    assert edges[1:-1:2] == edges[2::2]
    is_bias = [piece.name.endswith("bias") for piece in layout.pieces]
    assert is_bias == sorted(is_bias)
    assert {piece.name: piece.shape for piece in layout.pieces} == {
        name: tuple(parameter.shape) for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 30])
def test_the_segments_of_a_span_give_each_parameter_the_options_of_its_group(shards: int) -> None:
    layout = lay_out(normed(6), undecayed_biases)
    expected = [piece.options for piece in layout.pieces for _ in range(len(piece.span))]
    found = []
    for span in cut(layout.length, shards):
        segments = layout.segments(span)
        assert len(segments) <= 2
        for segment in segments:
            assert segment.span.overlap(span) == segment.span
            found += [segment.options] * len(segment.span)
    assert found == expected
    assert set(found) == {(), (("weight_decay", 0.0),)}


def test_a_tied_parameter_is_counted_once_under_its_first_name() -> None:
    names = [piece.name for piece in lay_out(Tied()).pieces]
    assert names == ["embed.weight", "middle.weight", "middle.bias", "out.bias"]


def test_frozen_parameters_and_buffers_are_left_out() -> None:
    module = normed(6)
    module.requires_grad_(False)
    module.get_submodule("2").requires_grad_(True)
    assert [piece.name for piece in lay_out(module).pieces] == ["2.weight", "2.bias"]


def test_writing_to_a_view_writes_to_the_flat_vector_at_its_span() -> None:
    layout = lay_out(normed(3), undecayed_biases)
    flat = torch.full((layout.length,), -1.0)
    for number, (piece, view) in enumerate(zip(layout.pieces, layout.views(flat).values(), strict=True)):
        assert tuple(view.shape) == piece.shape
        view.fill_(number)
        assert (flat[piece.span.start : piece.span.stop] == number).all()
        assert (flat == number).sum() == len(piece.span)


class Renamed(nn.Module):
    """Shapes of Sequential(Linear(2, 2), Linear(2, 2)), in an order and under names of its own."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


def test_the_fingerprint_tells_models_of_other_shapes_names_order_or_dtype_apart() -> None:
    models = [
        Renamed("0", "1"), Renamed("1", "0"), Renamed("0", "a"), Renamed("0"), Renamed("0", "1", "2"),
        Renamed("0", "1").double(), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)),
    ]  # fmt: skip
    prints = [lay_out(model).fingerprint() for model in models]
    assert len(set(prints)) == len(models)
    assert prints[0] == lay_out(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).fingerprint()
    assert lay_out(normed(2), undecayed_biases).fingerprint() != lay_out(normed(2)).fingerprint()


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).double())


def overlapping() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    module[1].weight = nn.Parameter(module[0].get_parameter("weight").data[:2])
    return module


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def complex_numbers() -> nn.Module:
    return nn.ParameterDict({"phase": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mixed, r"parameter 1\.weight has dtype torch\.float64, 0\.weight has torch\.float32"),
        (complex_numbers, "parameter phase has dtype torch.complex64"),
        (overlapping, r"parameters 0\.weight and 1\.weight are different views of the same memory"),
        (lambda: nn.LazyLinear(3), "parameter weight is lazy"),
        (frozen, "Linear has no trainable parameters"),
        (nn.ReLU, "ReLU has no trainable parameters"),
    ],
)
def test_a_model_that_is_no_vector_is_refused_by_the_name_of_the_parameter(
    model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        lay_out(model())
    assert str(caught.value).splitlines()[-1].startswith("hint: ")


def test_freezing_the_odd_parameter_makes_a_mixed_model_acceptable_as_the_hint_says() -> None:
    module = mixed()
    module.get_submodule("1").requires_grad_(False)
    assert lay_out(module).dtype == torch.float32


def test_what_differs_between_models_is_said_parameter_by_parameter() -> None:
    old = {piece.name: piece.shape for piece in lay_out(normed(3)).pieces}
    new = {piece.name: piece.shape for piece in lay_out(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))).pieces}
    assert changed_pieces(old, old) == []
    assert changed_pieces(old, new) == [
        "2.weight is missing in the model",
        "2.bias is missing in the model",
        "1.weight has shape [5, 3], the checkpoint [3]",
        "1.bias has shape [5], the checkpoint [3]",
    ]
    assert "2.weight is new in the model" in changed_pieces(new, old)
