# SPDX-License-Identifier: Apache-2.0
"""Large Scale Distributed Deep Networks (Dean et al., NIPS 2012) for PyTorch.

import distbelief as db

job = db.Job(model=Net, loss=nn.functional.cross_entropy, data=train_set, test=test_set,
             algorithm=db.Downpour(update_rule=db.adagrad(0.05)), cluster=db.Cluster(replicas=4, shards=2))
if __name__ == "__main__":
    result = db.train(job)
"""

from distbelief.cli import main
from distbelief.cluster import Cluster
from distbelief.downpour import Downpour
from distbelief.engine.base import Faults
from distbelief.engine.virtual import Costs
from distbelief.errors import (
    CheckpointError,
    ConfigurationError,
    DistbeliefError,
    TrainingFailed,
    UserCodeError,
)
from distbelief.job import Job
from distbelief.layers import L2Pool2d, LocalContrastNorm2d, LocallyConnected2d
from distbelief.minimize import Minimum, minimize
from distbelief.partition.rules import register_rule
from distbelief.plan import Plan, channels, grid, on, rows
from distbelief.report.summary import Summary
from distbelief.sandblaster import Sandblaster
from distbelief.train import Result, train
from distbelief.update_rule import (
    UpdateRule,
    adagrad,
    adam,
    adamw,
    adaptive_revision,
    cosine_decay,
    linear_decay,
    optimizer,
    sgd,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Cluster",
    "ConfigurationError",
    "Costs",
    "DistbeliefError",
    "Downpour",
    "Faults",
    "Job",
    "L2Pool2d",
    "LocalContrastNorm2d",
    "LocallyConnected2d",
    "Minimum",
    "Plan",
    "Result",
    "Sandblaster",
    "Summary",
    "TrainingFailed",
    "UpdateRule",
    "UserCodeError",
    "adagrad",
    "adam",
    "adamw",
    "adaptive_revision",
    "channels",
    "cosine_decay",
    "grid",
    "linear_decay",
    "main",
    "minimize",
    "on",
    "optimizer",
    "register_rule",
    "rows",
    "sgd",
    "train",
    "warmup",
]
