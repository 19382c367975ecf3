# SPDX-License-Identifier: Apache-2.0
"""Models that are cut into stages, and what is asked of them; and replicas as a program.

    python staged_models.py

reads lines of a folder, a number of partitions and a task of this module, as JSON. For each it runs the task in so many
processes, partitions of a replica that meet in the folder, and writes its exit status; what they say is in the folder.
"""

import contextlib
import datetime
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from distbelief.errors import DeadlineExceeded, PeerLost
from distbelief.partition.group import Site, form_default_group
from distbelief.partition.materialise import record
from distbelief.partition.pipeline import Pipeline, preload
from distbelief.partition.stages import Stage, StagePlan, stages


class Residual(nn.Module):
    """A block that cannot be cut inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Without a bias before BatchNorm: its gradient is nothing but rounding.
        self.first, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.norm(self.first(x)))))


class Pictures(nn.Module):
    """Residual blocks in a list, functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(4) for _ in range(4))
        self.last = nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                x = functional.max_pool2d(x, 2)
        return self.last(x.flatten(1))


CPU = torch.device("cpu")


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mix(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x))


class Decoder(nn.Module):
    """A transformer that predicts the next of 11 letters."""

    def __init__(self) -> None:
        super().__init__()
        self.letter, self.position = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.score = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 11))

    def forward(self, text: Tensor) -> Tensor:
        scores: Tensor = self.score(self.blocks(self.letter(text) + self.position.weight[: text.shape[1]]))
        return scores


class Recurrent(nn.Module):
    """Modules that return tuples, values that are turned round on the way, a table, a frozen layer, an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 6)
        self.enter.weight.requires_grad_(False)
        self.lstm, self.again = nn.LSTM(6, 7, batch_first=True), nn.LSTM(7, 5)
        self.register_buffer("table", torch.randn(7).exp())
        self.gain, self.shift = nn.Parameter(torch.ones(7)), torch.tensor(0.25)
        self.leave = nn.Linear(5, 4)

    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        scale = self.table / self.table.sum()
        steps, _ = self.lstm(self.enter(x) if start is None else start)
        steps, _ = self.again((steps * scale * self.gain + self.shift).transpose(0, 1))
        return self.leave(steps[-1]) + self.shift


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 8), nn.ReLU())),
        nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 5), nn.Linear(5, 4),
    )  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9), nn.ReLU(),
        nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8, affine=False), nn.Tanh(),
        nn.Linear(8, 7, bias=False), nn.BatchNorm1d(7, momentum=None), nn.Linear(7, 4),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (12,)),
    "normalised": (normalised, (12,)),
    "pictures": (Pictures, (2, 6, 6)),
    "decoder": (Decoder, (6,)),
    "recurrent": (Recurrent, (5, 3)),
}
"""Each with the shape of an example."""


def mini_batch(name: str, examples: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input and target."""
    generator = torch.Generator().manual_seed(seed)
    shape = MODELS[name][1]
    if name == "decoder":
        letters = torch.randint(11, (examples, 7), generator=generator)
        return letters[:, :-1], letters[:, 1:]
    classes = torch.randint(4, (examples,), generator=generator)
    return torch.randn(examples, *shape, dtype=torch.float64, generator=generator).to(dtype), classes


def loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def of(name: str, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """The constructor of a model in this dtype."""
    return lambda: MODELS[name][0]().to(dtype)


def plain(name: str, dtype: torch.dtype) -> nn.Module:
    """The uncut model."""
    torch.manual_seed(0)
    return of(name, dtype)()


def make(plan: StagePlan, partition: int, build: Callable[[], nn.Module], device: torch.device = CPU) -> Stage:
    """A stage with its initial values."""
    owned = [*plan.pieces(partition), *plan.frozen(partition), *plan.buffers(partition), *plan.others(partition)]
    values = dict(record(build, 0).values({piece.name: (piece.full_shape, piece.box) for piece in owned}))
    return plan.share(partition, values, device)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest element."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    """To 1e-12 in float64, 1e-6 in float32."""
    assert found is not None, what
    assert expected is not None, what
    wrong = error(found.detach(), expected.detach())
    assert wrong <= (1e-12 if expected.dtype == torch.float64 else 1e-6), f"{what} is wrong by {wrong}"


# what partitions are asked to do


SETTINGS = [(name, torch.float64, count) for name in MODELS for count in (1, 2, 4)]
SETTINGS += [(name, torch.float32, 4) for name in MODELS]
"""Of what is trained: the model, its dtype, the micro-batches."""
TRAINED, EVALUATED = (8, 7, 4, 8), (9, 3)
"""Examples of mini-batches."""


@functools.cache
def planned(name: str, dtype: torch.dtype, microbatches: int, partitions: int) -> StagePlan:
    """A plan, made once for all partitions, which are forked behind it, with what travels between them."""
    plan = stages(record(of(name, dtype), 0).module, mini_batch(name, 8, dtype)[0], partitions, microbatches)
    for examples in (*TRAINED, *EVALUATED):
        plan.boundaries(mini_batch(name, examples // plan.micro_batches(examples), dtype)[0].to("meta"))
    return plan


def trains(partition: int, partitions: int, device: torch.device = CPU) -> None:
    """Mini-batches of several sizes, evaluation between them: what the uncut model computes, part by part."""
    for name, dtype, microbatches in SETTINGS:
        uncut = plain(name, dtype).to(device)
        plan = planned(name, dtype, microbatches, partitions)
        stage = make(plan, partition, of(name, dtype), device)
        pipeline = Pipeline(plan, partition, stage, device)
        for step, examples in enumerate(TRAINED):
            what = f"{name}, {partitions} stages, {microbatches} micro-batches, step {step}"
            x, target = (part.to(device) for part in mini_batch(name, examples, dtype, step))
            uncut.zero_grad()
            stage.zero_grad()
            total, count = torch.zeros((), dtype=dtype, device=device), plan.micro_batches(examples)
            for part, part_target in zip(x.chunk(count), target.chunk(count), strict=True):
                part_loss = loss(uncut.train()(part), part_target) / count
                part_loss.backward()  # type: ignore[no-untyped-call]
                total += part_loss.detach()
            found = pipeline.step(x, target, loss)
            assert (found is None) == (partition != plan.out)
            if found is not None:
                check(found, total, f"loss of {what}")
            gradients = dict(uncut.named_parameters())
            for parameter_name, parameter in stage.parameters_by_name.items():
                if parameter.requires_grad:
                    check(parameter.grad, gradients[parameter_name].grad, f"{parameter_name} of {what}")
            buffers = dict(uncut.named_buffers())
            for buffer_name, buffer in stage.buffers_by_name.items():
                assert buffer.equal(buffers[buffer_name]), f"{buffer_name} of {what}"
            x = mini_batch(name, EVALUATED[step % 2], dtype, step)[0].to(device)
            output = pipeline.evaluate(x)
            assert stage.training
            assert (output is None) == (partition != plan.out)
            if output is not None:
                check(output, uncut.eval()(x), f"output of {what}")


def trains_through_host_memory(partition: int, partitions: int) -> None:
    """As partitions do that share an accelerator; where there is none, what they do so is the same."""
    trains(partition, partitions, torch.device("cuda", 0) if torch.cuda.is_available() else CPU)


def hooks(partition: int, partitions: int) -> None:
    """Hooks that take each gradient away, as replicas do, see parts whose sum is the mean's gradient."""
    uncut, dtype = plain("pictures", torch.float64), torch.float64
    x, target = mini_batch("pictures", 8, dtype)
    plan = stages(uncut, x, partitions, 4)
    stage = make(plan, partition, of("pictures", dtype))
    sums = {name: torch.zeros_like(parameter) for name, parameter in stage.parameters_by_name.items()}
    for name, parameter in stage.parameters_by_name.items():

        def take(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            sums[name] += parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    Pipeline(plan, partition, stage, torch.device("cpu")).step(x, target, loss)
    for part, part_target in zip(x.chunk(4), target.chunk(4), strict=True):
        (loss(uncut(part), part_target) / 4).backward()  # type: ignore[no-untyped-call]
    for name, found in sums.items():
        check(found, uncut.get_parameter(name).grad, name)


def dies(partition: int, partitions: int) -> None:
    """The last partition is gone after a step; the others learn of it."""
    x, target = mini_batch("perceptron", 8, torch.float32)
    plan = stages(plain("perceptron", torch.float32), x, partitions, 4)
    stage = make(plan, partition, of("perceptron", torch.float32))
    pipeline = Pipeline(plan, partition, stage, torch.device("cpu"))
    pipeline.step(x, target, loss)
    if partition < plan.out:
        with pytest.raises(PeerLost, match=f"says partition {partition} of {partitions}"):
            pipeline.step(x, target, loss)


def hangs(partition: int, partitions: int) -> None:
    """The last partition does nothing until the others have noticed."""
    store = dist.distributed_c10d._get_default_store()
    x, target = mini_batch("perceptron", 8, torch.float32)
    plan = stages(plain("perceptron", torch.float32), x, partitions, 4)
    stage = make(plan, partition, of("perceptron", torch.float32))
    pipeline = Pipeline(plan, partition, stage, torch.device("cpu"))
    pipeline.step(x, target, loss)
    if partition == plan.out:
        store.wait(["noticed"], datetime.timedelta(minutes=1))
    else:
        with pytest.raises(
            DeadlineExceeded, match=f"did not answer in time, says partition {partition} of {partitions}"
        ):
            pipeline.step(x, target, loss)
        store.set("noticed", "")


def listens(partition: int, partitions: int) -> None:
    """Nobody of another machine can connect."""
    opened = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists the folder
            opened.add(os.readlink(f"/proc/self/fd/{name}"))
    sockets = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()]
    own = [fields[1] for fields in sockets if fields[3] == "0A" and f"socket:[{fields[9]}]" in opened]  # listening
    assert own
    assert all(address.startswith("0100007F:") for address in own), own  # 127.0.0.1


TASKS = {
    "trains": trains,
    "trains through host memory": trains_through_host_memory,
    "hooks": hooks,
    "dies": dies,
    "hangs": hangs,
    "listens": listens,
}
PATIENCE_SECONDS = {
    "trains": 60.0,
    "trains through host memory": 60.0,
    "hooks": 60.0,
    "dies": 60.0,
    "hangs": 3.0,
    "listens": 60.0,
}
"""How long a partition waits for another."""


def live(folder: str, size: int, index: int, task: str) -> int:
    """One partition's life, in a process of its own; the exit status."""
    torch.set_num_threads(1)
    try:
        staged = task == "trains through host memory"
        form_default_group(
            dist.FileStore(str(Path(folder) / "meeting"), size), index, size, PATIENCE_SECONDS[task],
            Site(device=torch.device("cuda" if staged else "cpu")),
        )  # fmt: skip
        TASKS[task](index, size)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def replica(folder: str, partitions: int, task: str) -> int:
    """All partitions of a replica, each in a process of its own; the exit status."""
    if task.startswith("trains"):
        for setting in SETTINGS:
            planned(*setting, partitions)
    running = [forked(functools.partial(live, folder, partitions, index, task)) for index in range(partitions)]
    statuses = [os.waitpid(child, 0)[1] for child in running]
    return int(any(statuses))


def forked(life: Callable[[], int]) -> int:
    """The process id of a fork with this life."""
    child = os.fork()
    if child == 0:
        code = life()
        sys.stderr.flush()
        os._exit(code)
    return child


def said_in(told: Path, life: Callable[[], int]) -> int:
    """Live, and write into a file what is said."""
    with told.open("w") as output:
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        return life()


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        arguments = json.loads(line)
        child = forked(functools.partial(said_in, Path(arguments[0], "told"), functools.partial(replica, *arguments)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
