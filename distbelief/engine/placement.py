# SPDX-License-Identifier: Apache-2.0
"""What a job asks of a cluster: groups of roles and what each role needs. Decisions, without a cluster at hand."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distbelief.errors import ConfigurationError

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Roles that are placed together: on one host where they fit on one, or, `spread`, on as many as there are."""

    roles: tuple[str, ...]
    each: Resources
    """What every one of the roles needs; "CPU" and "GPU" are known to every cluster."""
    spread: bool = False

    def strategies(self, hosts: Sequence[Resources]) -> list[str]:
        """What Ray calls it, the best first, given what each host has."""
        if self.spread:
            return ["SPREAD"]
        on_one = any(self.fitting([host]) >= len(self.roles) for host in hosts)
        return ["STRICT_PACK", "PACK"] if on_one and len(self.roles) > 1 else ["PACK"]

    def fitting(self, hosts: Iterable[Resources]) -> int:
        """How many such roles fit on hosts with so much."""
        return sum(
            int(min(host.get(name, 0.0) / amount + 1e-6 for name, amount in self.each.items())) for host in hosts
        )


def total(groups: Iterable[Group]) -> dict[str, float]:
    """What all groups ask together."""
    asked: Counter[str] = Counter()
    for group in groups:
        asked.update({name: amount * len(group.roles) for name, amount in group.each.items()})
    return dict(asked)


def check_room(groups: Sequence[Group], free: Sequence[Resources]) -> None:
    """Raise ConfigurationError when hosts with so much that is free cannot hold the groups."""
    available: Counter[str] = Counter()
    for host in free:
        available.update(host)
    asked = total(groups)
    lacking = {name: amount for name, amount in asked.items() if amount > available[name] + 1e-6}
    if lacking:
        told = "; ".join(f"{amount:g} {name} asked, {available[name]:g} available" for name, amount in lacking.items())
        raise ConfigurationError(
            f"the cluster has no room for the job: {told}, on {len(free)} hosts",
            hint="use fewer replicas or shards, or less for each: Cluster(cpus_per_replica=..., gpus_per_replica=...)",
        )
    for group in groups:
        if not any(all(host.get(name, 0.0) >= amount for name, amount in group.each.items()) for host in free):
            needs = ", ".join(f"{amount:g} {name}" for name, amount in group.each.items())
            raise ConfigurationError(
                f"no host of the cluster has what {group.roles[0]} needs: {needs}",
                hint="ask less for each process, or use a cluster with larger hosts",
            )


def next_host(role: str, hosts: Sequence[str], planned: Mapping[str, str], living: Iterable[str]) -> str:
    """Where to start a role: where it was planned, or on the least crowded of the hosts that are left.

    `living` are the hosts of the roles that live, with repetition.
    """
    if planned.get(role) in hosts:
        return planned[role]
    crowd = Counter(living)
    return min(hosts, key=lambda host: crowd[host])
