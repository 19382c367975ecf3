# SPDX-License-Identifier: Apache-2.0
"""How layers are cut by units: a rule per kind of layer, and where to add one.

| file | layers |
|---|---|
| dense | Linear, Embedding |
| convolution | Conv1d, Conv2d, Conv3d |
| norm | BatchNorm, InstanceNorm, LayerNorm |
| attention | MultiheadAttention, scaled_dot_product_attention |
| plane | LocallyConnected2d, pooling, local contrast normalisation |
| pointwise | activations, sums, products, dropout |
| shapes | reshapes, transposes, slices, shapes |
| whole | everything without parameters that has no rule: computed as a whole by whoever needs it |
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d
from distbelief.partition.rules import attention, convolution, dense, norm, plane, pointwise, shapes
from distbelief.partition.rules.whole import whole_call
from distbelief.partition.site import Rule, Site, State

__all__ = ["Rule", "Site", "State", "has_rule", "register_rule", "rule_of"]

_MODULES: dict[type[nn.Module], Rule] = {
    nn.Linear: dense.linear,
    nn.Embedding: dense.embedding,
    nn.LayerNorm: norm.layer_norm,
    nn.MultiheadAttention: attention.multihead,
    LocallyConnected2d: plane.locally_connected,
    LocalContrastNorm2d: plane.contrast_norm,
    L2Pool2d: plane.l2_pool,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution.convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), norm.batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), norm.batch_norm),
    nn.Flatten: shapes.reshape,
    nn.Unflatten: shapes.reshape,
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), plane.max_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), plane.average_pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), plane.adaptive_pool
    ),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), pointwise.dropout_module),
    **dict.fromkeys(pointwise.MODULES, pointwise.pointwise),
}

_FUNCTIONS: dict[Callable[..., Any] | str, Rule] = {
    **dict.fromkeys(pointwise.FUNCTIONS, pointwise.pointwise),
    functional.scaled_dot_product_attention: attention.scaled_dot_product,
    functional.dropout: pointwise.dropout_function,
    **dict.fromkeys((torch.flatten, torch.reshape, torch.unflatten, torch.squeeze, torch.unsqueeze), shapes.reshape),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten", "squeeze", "unsqueeze"), shapes.reshape),
    **dict.fromkeys((torch.transpose, "transpose"), shapes.transpose),
    **dict.fromkeys((torch.permute, "permute"), shapes.permute),
    **dict.fromkeys(shapes.QUESTIONS, shapes.shape_of),
    getattr: shapes.shape_of,
    operator.getitem: shapes.getitem,
}


def register_rule(layer: type[nn.Module], rule: Rule) -> None:
    """Cut layers of exactly this class by `rule`, in this process; see distbelief.partition.site for what a rule is.

    Call it where the model is defined, so that every process that builds the model knows the rule, too.
    """
    _MODULES[layer] = rule


def has_rule(module: nn.Module) -> bool:
    """Whether the module is cut as one layer, not by what its forward calls."""
    return type(module) in _MODULES


def rule_of(site: Site) -> Rule:
    """The rule for a call. Raises ConfigurationError for a module that has parameters and no rule."""
    if site.module is None:
        return _FUNCTIONS.get(site.call.target, whole_call)
    rule = _MODULES.get(type(site.module))
    if rule is None and any(True for _ in (*site.module.parameters(), *site.module.buffers())):
        raise site.impossible("has no unit rule")
    return rule or whole_call
