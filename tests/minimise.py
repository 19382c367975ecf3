# SPDX-License-Identifier: Apache-2.0
"""A Sandblaster of one process: the solver, some sections in memory, and an objective of some bundles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distbelief.basis import Basis
from distbelief.lbfgs import Command, Evaluate, Gram, Options, Solver, SolverState, Step, Stop
from distbelief.parameters import cut
from distbelief.penalty import Penalty
from distbelief.sealed import add, merge

Objective = Callable[[Tensor, int], tuple[float, Tensor]]
"""(x, bundle) -> sum of the losses of the bundle's examples, and its gradient."""


def one_bundle(function: Callable[[Tensor], Tensor]) -> Objective:
    """A function of x as an objective of one example."""

    def objective(x: Tensor, bundle: int) -> tuple[float, Tensor]:
        leaf = x.clone().requires_grad_(True)
        value = function(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient

    return objective


@dataclass
class Sandblaster:
    """Carries out the commands; counts what it was asked."""

    objective: Objective
    start: Tensor
    options: Options = field(default_factory=Options)
    sections: int = 3
    bundles: Sequence[int] = (1,)
    """Examples in each bundle."""
    penalty: Penalty | None = None
    """Of every entry."""
    history_dtype: torch.dtype | None = None
    state: SolverState | None = None
    observe: Callable[["Sandblaster", Command], None] = lambda run, command: None
    """Called before each question, when every step before it is made."""
    seals: int = 0
    grams: int = 0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spans = cut(self.start.numel(), self.sections)
        self.x = [self.start[span.start : span.stop].clone() for span in self.spans]
        self.bases = [
            Basis(
                x, self.options.history,
                [] if self.penalty is None else [replace(self.penalty, stop=len(x))],
                self.history_dtype,
            )
            for x in self.x
        ]  # fmt: skip
        self.solver = Solver(self.options, self.state)

    @property
    def point(self) -> Tensor:
        return torch.cat(self.x)

    def run(self, *, resume: bool = False) -> Stop:
        commands = self.solver.resume() if resume else self.solver.begin()
        while True:
            for command in commands:
                if isinstance(command, Evaluate | Gram):
                    self.observe(self, command)
                match command:
                    case Step():
                        self.steps.append(command)
                        for basis in self.bases:
                            basis.step(command)
                    case Evaluate():
                        commands = self.evaluate(command)
                    case Gram():
                        self.grams += 1
                        commands = self.solver.told_gram(add([basis.gram(command.pairs) for basis in self.bases]))
                    case Stop():
                        return command

    def evaluate(self, asked: Evaluate) -> list[Command]:
        x = torch.empty_like(self.start)
        for basis, span in zip(self.bases, self.spans, strict=True):
            basis.open()
            basis.trial(asked.t, x[span.start : span.stop])
        loss = 0.0
        for bundle in range(len(self.bundles)):
            value, gradient = self.objective(x, bundle)
            loss += value
            for basis, span in zip(self.bases, self.spans, strict=True):
                basis.add(gradient[span.start : span.stop])
        examples = sum(self.bundles)
        self.seals += 1
        sealed = merge([basis.seal(asked.t, examples, asked.pairs, whole=asked.whole) for basis in self.bases])
        return self.solver.tell(loss / examples, sealed)
