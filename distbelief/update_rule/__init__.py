# SPDX-License-Identifier: Apache-2.0
"""Update rules: how a parameter server shard turns a pushed gradient into new parameters (paper, section 4.1).

rule.py               what an update rule is; `check` at the door
optimizers.py         the rules by name: adagrad (the paper's), sgd, adam, adamw, and optimizer for any other
torch_rule.py         any elementwise torch.optim optimizer in a shard
bare.py               optimizers without what torch wraps around their steps
adaptive_revision.py  Adagrad that takes the delay of a gradient into account
schedule.py           the learning rate as a function of examples applied
trial.py              runs an optimizer on a few numbers, to know it before it is given millions
"""

from distbelief.update_rule.adaptive_revision import adaptive_revision
from distbelief.update_rule.optimizers import adagrad, adam, adamw, optimizer, sgd
from distbelief.update_rule.rule import BoundRule, UpdateRule, check
from distbelief.update_rule.schedule import Schedule, cosine_decay, linear_decay, warmup

__all__ = [
    "BoundRule",
    "Schedule",
    "UpdateRule",
    "adagrad",
    "adam",
    "adamw",
    "adaptive_revision",
    "check",
    "cosine_decay",
    "linear_decay",
    "optimizer",
    "sgd",
    "warmup",
]
