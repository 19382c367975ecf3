# SPDX-License-Identifier: Apache-2.0
"""Rules for attention, cut by heads."""

import math
from typing import Any, final

import torch
from torch import nn
from torch.nn import functional

from distbelief.partition.box import Box, sizes, whole
from distbelief.partition.rules.pointwise import seen
from distbelief.partition.rules.whole import as_a_whole, states_in
from distbelief.partition.share import Draws
from distbelief.partition.site import Part, Site, State, part, tensor
from distbelief.partition.trace import Value


def multihead(
    site: Site, query: State, key: State, value: State, key_padding_mask: State | None = None,
    need_weights: bool = True, attn_mask: State | None = None, average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[State, None]:  # fmt: skip
    """nn.MultiheadAttention: heads with their projections, from the whole inputs; then rows of the output projection.

    The projection weights are cut as (3, width, width), so that a head's query, key and value lie together.
    """
    module: nn.MultiheadAttention = site.module
    if not module.batch_first or module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise site.impossible(
            "is not of the kind that has a unit rule",
            hint="use batch_first=True, kdim and vdim None, add_bias_kv and add_zero_attn False",
        )
    if any(user.users and user.args[1] != 0 for user in site.call.node.users):
        raise site.impossible("returns its weights, which no partition has whole", hint="use need_weights=False")
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    if any(mask.division is None or len(mask.division.shape) + mask.division.batched != 2 for mask in masks):
        raise site.impossible("has a mask per head", hint="use a mask of shape (length, length)")
    width, size = module.embed_dim, module.embed_dim // module.num_heads
    inner = site.yielding(Value(tensor(query).shape, query.dtype, batched=True))
    inputs = list(dict.fromkeys((query, key, value, *masks)))
    places = [inputs.index(state) for state in (query, key, value)]
    padding = None if key_padding_mask is None else inputs.index(key_padding_mask)
    mask = None if attn_mask is None else inputs.index(attn_mask)
    layer = len(site.steps)

    def build(box: Box) -> nn.Module:
        return Heads(module, box[-1], (places[0], places[1], places[2], padding, mask), layer)

    def pieces(box: Box) -> dict[str, Part]:
        weight = ((0, 3), box[-1], (0, width)), (3, width, width)
        bias = ((0, 3), box[-1]), (3, width)
        return {"in_proj_weight": weight} | ({"in_proj_bias": bias} if module.in_proj_bias is not None else {})

    heads = inner.choose(query, {"rows": lambda: inner.along(-1, size)}, width)
    context = inner.compute(inputs, heads, build, pieces=pieces)

    def project(box: Box) -> nn.Module:
        return nn.Linear(width, sizes(box)[-1], module.out_proj.bias is not None, dtype=module.out_proj.weight.dtype)

    def rows(box: Box) -> dict[str, Part]:
        weight = {"weight": part(module.out_proj, "weight", (box[-1], (0, width)))}
        return weight | (
            {"bias": part(module.out_proj, "bias", (box[-1],))} if module.out_proj.bias is not None else {}
        )

    division = heads if heads.owner is not None else inner.along(-1)
    return inner.compute([context], division, project, pieces=rows, within="out_proj."), None


@final
class Heads(nn.Module):
    """Some heads of an attention: softmax(q k' / sqrt(size) + mask) v, one after another in the last dimension."""

    draws: Draws | None = None
    """Set by the share that this belongs to."""

    def __init__(
        self, module: nn.MultiheadAttention, units: tuple[int, int],
        places: tuple[int, int, int, int | None, int | None], layer: int,
    ) -> None:  # fmt: skip
        """`places` of query, key, value, padding mask and mask among the inputs."""
        super().__init__()
        own, dtype = units[1] - units[0], module.in_proj_weight.dtype
        self.in_proj_weight = nn.Parameter(torch.empty(3 * own, module.embed_dim, dtype=dtype))
        self.in_proj_bias = None if module.in_proj_bias is None else nn.Parameter(torch.empty(3 * own, dtype=dtype))
        self._size = module.embed_dim // module.num_heads
        self._heads, self._first, self._rate = module.num_heads, units[0] // self._size, module.dropout
        self._places, self._layer = places, layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Shape (batch, length, units)."""
        query, key, value = (inputs[place] for place in self._places[:3])
        if query is key is value:
            projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            projected = tuple(map(functional.linear, (query, key, value), weights, biases))
        q, k, v = (one.reshape(*one.shape[:2], -1, self._size).transpose(1, 2) for one in projected)
        mask = self._mask(inputs, q.dtype)
        if self.training and self._rate > 0:
            context = self._thinned(q, k, mask) @ v
        else:
            context = functional.scaled_dot_product_attention(q, k, v, mask)
        joined: torch.Tensor = context.transpose(1, 2).flatten(2)
        return joined

    def _mask(self, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores: shape (batch or 1, 1, length or 1, length)."""
        total = None
        for place, index in ((self._places[3], (slice(None), None, None)), (self._places[4], (None, None))):
            if place is not None:
                given = inputs[place]
                if given.dtype == torch.bool:  # True hides
                    given = torch.zeros_like(given, dtype=dtype).masked_fill(given, -math.inf)
                total = given[index] if total is None else total + given[index]
        return total

    def _thinned(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention weights with dropout, whose mask is drawn for all heads."""
        assert self.draws is not None
        scores = q @ k.transpose(-2, -1) / math.sqrt(self._size)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        generator = self.draws.generator(self._layer, q.device)
        shape = (q.shape[0], self._heads, q.shape[2], k.shape[2])
        drawn = torch.rand(shape, generator=generator, device=q.device)[:, self._first : self._first + q.shape[1]]
        thinned: torch.Tensor = weights * (drawn >= self._rate) / (1 - self._rate)
        return thinned


def scaled_dot_product(site: Site, query: State, key: State, value: State, *args: Any, **kwargs: Any) -> State:
    """functional.scaled_dot_product_attention of (batch, heads, length, size): heads."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    options = dict(zip(names, args, strict=False)) | kwargs
    evaluating = dict(zip(names, site.evaluating[0][3:], strict=False)) | dict(site.evaluating[1])
    if options.get("dropout_p") or evaluating.get("dropout_p"):
        raise site.impossible("draws random numbers", hint="use nn.MultiheadAttention for attention with dropout")
    mask = options.pop("attn_mask", None)
    inputs = [query, key, value] + ([mask] if mask is not None else [])
    if states_in(options) or any(state.division is None or not state.division.batched for state in inputs[:3]):
        raise site.impossible("has arguments that have no unit rule")
    if len(site.shape) != 3 or options.get("enable_gqa"):
        return as_a_whole(site, query, key, value, *args, **kwargs)
    division = site.follow(query, {"rows": lambda: site.along(0)})
    if division.is_cut(1) or division.is_cut(2):
        division = site.along(0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask, **options)

    def need(box: Box) -> list[Box | None]:
        own = [(box[0], *whole(tensor(state).shape[1:])) for state in inputs[:3]]
        return [*own, *(seen((*box[:2], (0, tensor(key).shape[1])), True, state) for state in inputs[3:])]

    return site.compute(inputs, division, lambda box: attend, need=need)
