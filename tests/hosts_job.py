# SPDX-License-Identifier: Apache-2.0
"""A job on the Ray cluster at an address, as a program of its own: `python -m tests.hosts_job ADDRESS RUN`.

Prints every event as one line of JSON.
"""

import sys

import msgspec

import distbelief as db
from distbelief.events import Observation
from tests import problems

EXAMPLES, EPOCHS = 640, 60
REPLICAS, SHARDS = 3, 3


def say(observation: Observation) -> None:
    print(msgspec.json.encode(observation).decode(), flush=True)


def main(address: str, run: str) -> None:
    cluster = db.Cluster(
        engine="ray", address=address, replicas=REPLICAS, shards=SHARDS, threads_per_replica=1, device="cpu"
    )
    job = problems.job(
        cluster=cluster, algorithm=db.Downpour(update_rule=db.adagrad(0.1), warmstart=0, cooldown=0),
        epochs=EPOCHS, checkpoint_seconds=0.5, run=run,
    )  # fmt: skip
    # Computing that takes no time would be over before anything can happen to it.
    slow = {f"replica/{index}": 4.0 for index in range(REPLICAS)}
    db.train(job, view=False, listeners=[say], faults=db.Faults(slow=slow))


if __name__ == "__main__":
    main(*sys.argv[1:])
