# SPDX-License-Identifier: Apache-2.0
"""Rules for layers cut by output units: linear layers and embeddings."""

from typing import Any

from torch import nn

from distbelief.partition.box import Box, sizes, whole
from distbelief.partition.site import Part, Site, State, part


def linear(site: Site, x: State) -> State:
    """Rows of the weight; the whole input. Any dimensions before the last one stay whole.

    A light layer that has fewer outputs than inputs, as the last one often is, stays on one partition: it costs less
    than to give everybody its inputs and to bring its outputs together.
    """
    module: nn.Linear = site.module

    def build(box: Box) -> nn.Module:
        return nn.Linear(module.in_features, sizes(box)[-1], module.bias is not None, dtype=module.weight.dtype)

    def pieces(box: Box) -> dict[str, Part]:
        weight = {"weight": part(module, "weight", (box[-1], (0, module.in_features)))}
        return weight | ({"bias": part(module, "bias", (box[-1],))} if module.bias is not None else {})

    narrow = site.light and module.out_features < module.in_features
    division = site.choose(x, {"rows": lambda: site.along(-1)}, 0 if narrow else module.out_features)
    return site.compute([x], division, build, pieces=pieces)


def embedding(site: Site, x: State) -> State:
    """Columns of the table, so that every partition looks up its part of every token."""
    module: nn.Embedding = site.module
    if module.max_norm is not None:
        raise site.impossible("renormalises rows while it looks them up", hint="use max_norm=None")

    def build(box: Box) -> nn.Module:
        options: dict[str, Any] = {"padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
        return nn.Embedding(module.num_embeddings, sizes(box)[-1], dtype=module.weight.dtype, **options)

    def pieces(box: Box) -> dict[str, Part]:
        return {"weight": part(module, "weight", (*whole((module.num_embeddings,)), box[-1]))}

    division = site.choose(x, {"rows": lambda: site.along(-1)}, module.embedding_dim)
    return site.compute([x], division, build, pieces=pieces)
