# SPDX-License-Identifier: Apache-2.0
"""What a model, a loss or a data set may not be, said before anything starts; and odd ones that are trained right."""

import functools
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ChainDataset, DataLoader, Dataset, IterableDataset, TensorDataset

import distbelief as db
from distbelief.attempt import attempt
from distbelief.events import EpochFinished, Observation
from distbelief.job import prepare
from tests import problems

FEATURES, CLASSES = problems.FEATURES, problems.CLASSES


def refused(tmp_path: Path, **fields: Any) -> str:
    """What a job with these fields is refused with; nothing is left of its run."""
    with pytest.raises(db.ConfigurationError) as caught:
        db.train(problems.job(run=tmp_path / "run", **fields), view=False)
    assert not list(tmp_path.glob("run*"))
    assert "\nhint: " in str(caught.value)
    return str(caught.value)


# models


class WithBuffer(nn.Module):
    """A layer and a buffer, made by a function of the layer."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("extra", make(self.layer))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WithExtraState(nn.Module):
    """Its state_dict holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class HandingOut(nn.BatchNorm1d):
    """Its state_dict holds what `make` makes of the numbers of this name."""

    def __init__(self, name: str, make: Any) -> None:
        super().__init__(FEATURES)
        self.name, self.make = name, make

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {**state, self.name: self.make(state[self.name])}


def handing_out(name: str, make: Any) -> nn.Module:
    return HandingOut(name, make)


def loader() -> DataLoader[Any]:
    return DataLoader(problems.points(64), 16)


class Framed(dict[str, Tensor]):
    """As a frame of pandas: its items are columns."""

    iloc = None


class Skipping(nn.Module):
    """Leaves a layer out by chance, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, CLASSES), nn.Linear(CLASSES, CLASSES)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) if self.calls % 2 else self.second(self.first(x))


def with_buffer(make: Any) -> nn.Module:
    return WithBuffer(make)


def the_weight(layer: nn.Linear) -> Tensor:
    return layer.weight.detach()


def sparse(layer: nn.Linear) -> Tensor:
    return torch.eye(3).to_sparse()


def large_integers(layer: nn.Linear) -> Tensor:
    return torch.tensor([3, (1 << 53) + 1])


def holding_a_view() -> nn.Module:
    """As where a decoder is tied to the encoder by hand."""
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    vars(model[0])["decoder"] = model[0].weight.t()
    return model


def normalised_anew() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(FEATURES, CLASSES)))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.LazyBatchNorm1d(affine=False))


def expanded() -> nn.Module:
    model = nn.Linear(FEATURES, CLASSES)
    model.weight = nn.Parameter(torch.ones(1, FEATURES).expand(CLASSES, FEATURES))
    return model


class Looked(nn.Module):
    """An embedding whose rows are shortened when they are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.layer = nn.Embedding(4, 5, max_norm=0.1), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.rows((x[:, 0] > 0).long()))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (functools.partial(with_buffer, the_weight), "buffer extra is a view of parameter layer.weight"),
        (holding_a_view, "0.decoder is a view of parameter 0.weight, and would go on showing its first values"),
        (functools.partial(with_buffer, sparse), "buffer extra is sparse (torch.sparse_coo)"),
        (functools.partial(with_buffer, large_integers), "buffer extra holds integers above 9,007,199,254,740,992"),
        (lazy, "buffer 1.running_mean is lazy"),
        (expanded, "parameter weight is expanded: several of its numbers lie at the same place"),
        (functools.partial(handing_out, "weight", torch.clone), "state_dict() of HandingOut has a copy of weight"),
        (functools.partial(handing_out, "running_var", torch.Tensor.double), "has a copy of running_var: exports"),
        (
            functools.partial(handing_out, "bias", torch.Tensor.tolist),
            "HandingOut has a list under bias",
        ),
        (WithExtraState, "module of the model (WithExtraState) has an extra state that is no tensor"),
        (Looked, "computing the loss changes parameter rows.weight itself, as max_norm"),
    ],
)
def test_models_whose_parts_would_be_lost_are_refused_by_name(model: Any, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, model=model)


def test_a_view_that_is_made_anew_before_each_forward_pass_is_not_refused() -> None:
    attempt(prepare(problems.job(model=normalised_anew))[0])


# losses and groups


class Weighing(nn.Module):
    """A loss with a parameter."""

    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=trained)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) * torch.exp(-self.log_variance)


def one_number(model: nn.Module, test: Any) -> Any:
    return 0.5


def test_an_evaluation_that_returns_no_metrics_ends_the_job_soon_with_what_it_returned(tmp_path: Path) -> None:
    """It gets the whole test set, so it is not tried before the start, but beside the first mini-batches."""
    heard: list[Observation] = []
    job = problems.job(evaluate=one_number, run=tmp_path / "run", epochs=50)
    with pytest.raises(db.DistbeliefError, match=r"Job\(evaluate=\.\.\.\) returned a float\nhint: return metrics"):
        db.train(job, view=False, listeners=[heard.append], costs=db.Costs(example_seconds=1e-3))
    assert not [one for one in heard if isinstance(one.event, EpochFinished)]


def test_a_model_that_leaves_layers_out_by_chance_has_no_minimum(tmp_path: Path) -> None:
    with pytest.raises(db.ConfigurationError, match="depends on other parameters from call to call\nhint: remove what"):
        db.train(problems.job(model=Skipping, algorithm=db.Sandblaster(), run=tmp_path / "run"), view=False)


def test_what_is_no_job_is_not_trained() -> None:
    with pytest.raises(db.ConfigurationError, match=r"distbelief\.train was given a function, not a Job\nhint: give"):
        db.train(problems.classifier)  # type: ignore[arg-type]


def splits() -> dict[str, Any]:
    return {"test": problems.points(8), "train": problems.points(64)}


def without_gradient(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.detach(), target)


def no_groups(name: str, parameter: nn.Parameter) -> None:
    return None


def of_dict(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input"]), batch["target"])


class Dicts(TensorDataset):
    """Gives dicts."""

    def __init__(self) -> None:
        super().__init__(*problems.points(64).tensors)

    def __getitem__(self, index: int) -> Any:
        return dict(zip(("input", "target"), super().__getitem__(index), strict=True))


def weighted() -> TensorDataset:
    return TensorDataset(*problems.points(64).tensors, torch.ones(64))


class Counted(IterableDataset[Any]):
    """Has a length, but no index."""

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Any:
        return iter([])


def chained() -> Dataset[Any]:
    return ChainDataset([Counted()])


@pytest.mark.parametrize(
    ("data", "instead"),
    [
        (loader, "torch.utils.data.Subset(loader.dataset, list(loader.sampler))"),
        (chained, "list(data) is one, if it fits"),
    ],
)
def test_who_gives_a_loader_or_a_stream_is_told_what_to_give_instead(data: Any, instead: str) -> None:
    with pytest.raises(db.ConfigurationError, match=f"hint: .*{re.escape(instead)}"):
        prepare(problems.job(data=data))


def halved() -> nn.Module:
    return problems.classifier().half()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": without_gradient}, "the loss of a mini-batch does not lead back to the parameters"),
        ({"groups": no_groups}, "Job(groups=...) gives 0.weight a NoneType"),
        ({"data": Dicts}, "Job(loss=...) takes mini-batches of (input, target), the data set gives a dict"),
        ({"data": weighted}, "takes mini-batches of (input, target), the data set gives (Tensor, Tensor, Tensor)"),
        (
            {"data": Dicts, "test": Dicts, "loss": None, "step": of_dict},
            "Job(metrics=...) takes mini-batches of (input",
        ),
        ({"data": loader}, "Job(data=...) is a DataLoader; replicas make mini-batches themselves"),
        ({"data": Framed}, "Job(data=...) is a Framed, which is no data set"),
        (
            {"data": splits},
            "Job(data=...) is a dict of data sets\nhint: give one of its splits, such as data['train']",
        ),
        ({"data": Counted}, "Job(data=...) is a Counted, which has no length or cannot be indexed"),
        ({"model": halved}, "adagrad(0.1) makes NaN of a gradient of zero in torch.float16\nhint: use a larger eps"),
        (
            {"algorithm": db.Downpour(update_rule=db.sgd(0.1, schedule=db.linear_decay(64, end=-1.0)))},
            "the rate cannot be multiplied by that\nhint: answer a finite factor of 0 or more for each",
        ),
        ({"data": chained}, "Job(data=...) is a ChainDataset, which has no length or cannot be indexed"),
    ],
)
def test_what_does_not_go_together_is_refused_by_what_it_is(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, **fields)


def test_a_loss_with_parameters_of_its_own_is_refused_unless_they_are_frozen() -> None:
    with pytest.raises(db.ConfigurationError, match="Weighing with parameters of its own, log_variance first"):
        problems.job(loss=Weighing())
    assert problems.job(loss=Weighing(trained=False)).loss is not None


def weighed(weighing: Weighing, output: Tensor, target: Tensor) -> Tensor:
    return weighing(output, target)


def weighed_by_name(output: Tensor, target: Tensor, *, weighing: nn.Module) -> Tensor:
    loss: Tensor = weighing(output, target)
    return loss


def weighed_step(weighing: Weighing, model: nn.Module, batch: Any) -> Tensor:
    return weighing(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("fields", "partitions"),
    [
        (lambda weighing: {"loss": functools.partial(weighed, weighing)}, 1),
        (lambda weighing: {"loss": functools.partial(weighed, weighing)}, 2),
        (lambda weighing: {"loss": None, "step": functools.partial(weighed_step, weighing), "metrics": {}}, 1),
    ],
)
@pytest.mark.parametrize("algorithm", [db.Downpour(), db.Sandblaster(max_iterations=1)])
def test_a_function_that_computes_with_parameters_of_its_own_is_refused_unless_they_are_frozen(
    fields: Any, partitions: int, algorithm: Any
) -> None:
    cluster = db.Cluster(replicas=1, partitions=partitions)
    training, frozen = (
        prepare(problems.job(algorithm=algorithm, cluster=cluster, **fields(Weighing(trained))))[0]
        for trained in (True, False)
    )
    with pytest.raises(db.ConfigurationError, match=r"parameter of shape \[\] that the model has not.*\nhint: let the"):
        attempt(training)
    attempt(frozen)


class Centring(nn.Module):
    """A loss that follows the outputs, as those of self-distillation do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(CLASSES))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.centre = 0.9 * self.centre + 0.1 * output.mean(0)  # type: ignore[has-type]
        return nn.functional.cross_entropy(output - self.centre, target)


class Distilling:
    """A step with a teacher, whose parameters follow the model's, or do not."""

    def __init__(self, share: float) -> None:
        self.teacher, self.share = problems.classifier().requires_grad_(False), share

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        for one, other in zip(self.teacher.parameters(), model.parameters(), strict=True):
            one.data.lerp_(other, self.share)
        output: Tensor = model(batch[0])
        return (output - self.teacher(batch[0])).square().mean()


centring = Centring()


def centred(output: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = centring(output, target)
    return loss


class Centred:
    """A method whose global changes, of an object that holds nothing."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return centred(output, target) + 0 * centring.centre.sum()


@pytest.mark.parametrize(
    ("fields", "partitions"),
    [
        ({"loss": Centring()}, 1),
        ({"loss": Centring()}, 2),
        ({"loss": centred}, 1),
        ({"loss": functools.partial(centred)}, 1),
        ({"loss": Centred().loss}, 1),
        ({"loss": functools.partial(weighed, Centring())}, 1),
        ({"loss": functools.partial(weighed_by_name, weighing=Centring())}, 1),
        ({"loss": Centring().forward}, 1),
        ({"loss": None, "step": Distilling(0.5), "metrics": {}}, 1),
    ],
)
def test_what_follows_the_training_outside_of_the_model_is_refused(
    fields: dict[str, Any], partitions: int, tmp_path: Path
) -> None:
    cluster = db.Cluster(replicas=1, partitions=partitions, engine="local" if partitions > 1 else "simulated")
    said = refused(tmp_path, cluster=cluster, **fields)
    assert re.search(
        "computing the loss changes (centre|0.weight) of a (Centring|Sequential) that the model has not", said
    )


def lacking() -> Any:
    """A function one of whose variables has no value, as one of a function that is defined after it."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) if len(output) else missing

    if not loss:
        missing = torch.zeros(())
    return loss


@pytest.mark.parametrize(
    "fields",
    [{"loss": Centring().eval()}, {"loss": None, "step": Distilling(0.0), "metrics": {}}, {"loss": lacking()}],
)
def test_what_stands_still_outside_of_the_model_is_not_refused(fields: dict[str, Any]) -> None:
    attempt(prepare(problems.job(**fields))[0])


def draws(examples: int) -> Dataset[Any]:
    return Noisy(*problems.points(examples).tensors)


class Noisy(TensorDataset):
    """Adds noise to each example, whenever it is asked for."""

    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return inputs + torch.randn(inputs.shape), target


@pytest.mark.parametrize("partitions", [1, 2, db.Plan.stages(2)], ids=["uncut", "units", "stages"])
def test_sandblaster_refuses_data_that_are_others_each_time(partitions: Any, tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=1, shards=1, partitions=partitions)
    said = refused(tmp_path, data=functools.partial(draws, 64), algorithm=db.Sandblaster(), cluster=cluster)
    assert "the data set gives other values each time it is asked for the same examples" in said


class Pooled(TensorDataset):
    """Asks a pool of threads, which is started with it or when it is first asked."""

    def __init__(self, early: bool) -> None:
        super().__init__(*problems.points(64).tensors)
        self.pool = ThreadPoolExecutor(2)
        if early:
            self.pool.submit(time.sleep, 0.0).result()

    def __getitems__(self, indices: list[int]) -> Any:
        return list(self.pool.map(self.__getitem__, indices))


@pytest.mark.slow
def test_threads_that_no_fork_would_have_are_refused_and_those_of_a_role_are_not(tmp_path: Path) -> None:
    fields = {"test": None, "cluster": db.Cluster(replicas=2, threads_per_replica=1)}
    said = refused(tmp_path, data=functools.partial(Pooled, True), **fields)
    assert "has started threads: ThreadPoolExecutor-0_0" in said
    job = problems.job(data=functools.partial(Pooled, False), run=tmp_path / "run", **fields)
    assert db.train(job, view=False).summary.examples.seen == 128


# what is odd, and trained right


class Averaging(nn.Module):
    """Assigns its buffers anew in each forward pass, and has one that is expanded."""

    steps: Tensor
    mean: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(CLASSES))
        self.register_buffer("places", torch.arange(CLASSES).expand(4, -1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if self.training:
            self.steps = self.steps + 1
            self.mean = 0.5 * self.mean + 0.5 * output.detach().mean(0)
        return output + self.places[0]


@pytest.mark.parametrize("engine", ["simulated", pytest.param("local", marks=pytest.mark.slow)])
def test_buffers_that_the_forward_pass_assigns_anew_are_those_of_the_plain_loop(engine: Any, tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=1, shards=2, engine=engine, threads_per_replica=1)
    job = problems.job(
        model=Averaging, cluster=cluster, algorithm=db.Downpour(update_rule=db.sgd(0.1), fetch="awaited"),
        run=tmp_path / "run",
    )  # fmt: skip
    trained = db.train(job, view=False).model.state_dict()
    model = problems.fresh_model(job)
    expected = problems.plain_loop(job, torch.optim.SGD(model.parameters(), 0.1), model).state_dict()
    assert trained["steps"] == expected["steps"] == 80
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def drop(parameter: Any) -> None:
    parameter.grad = None


def dropping() -> nn.Module:
    model: Any = problems.classifier()
    model[0].weight.register_post_accumulate_grad_hook(drop)
    return model


def test_a_gradient_that_a_hook_drops_is_none(tmp_path: Path) -> None:
    cluster = db.Cluster(replicas=1, shards=2, engine="simulated")
    downpour = db.Downpour(update_rule=db.adagrad(0.1), fetch="awaited")
    job = problems.job(model=dropping, cluster=cluster, algorithm=downpour, run=tmp_path / "run")
    model = problems.fresh_model(job)
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1, fused=True)
    assert problems.same_parameters(db.train(job, view=False).model, problems.plain_loop(job, optimizer, model))


class Growing(nn.Module):
    """Keeps all outputs in a buffer."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if self.training:
            self.seen = torch.cat([self.seen, output.detach().flatten()])
        return output


def test_a_buffer_that_grows_is_refused_with_its_shapes(tmp_path: Path) -> None:
    with pytest.raises(
        db.ConfigurationError, match=r"buffer seen was real of shape \[0\] and now is real of shape \[\d+\]"
    ):
        db.train(problems.job(model=Growing, run=tmp_path / "run"), view=False)


class Caching(nn.Module):
    """Makes a table when it is first needed, in a buffer that is not kept."""

    table: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("other", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.table, self.other = torch.arange(CLASSES), None
        output: Tensor = self.layer(x) + self.table
        return output


class Wavering(nn.Module):
    """Assigns fractions to a buffer of whole numbers."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.25
        output: Tensor = self.layer(x)
        return output


def test_buffers_that_are_not_persistent_may_change_their_shape_and_others_may_not_change_their_kind(
    tmp_path: Path,
) -> None:
    assert db.train(problems.job(model=Caching, run=tmp_path / "run"), view=False).summary.examples.missing == 0
    said = refused(tmp_path / "other", model=Wavering)
    assert "buffer mean was whole of shape [] and now is real of shape []" in said


def in_place() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(FEATURES, CLASSES))


class Scaling(nn.Linear):
    """Scales its input in place, and would scale it once more if it were given it again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(0.5))


def scaling() -> nn.Module:
    return Scaling(FEATURES, CLASSES)


class FromOne(nn.Embedding):
    """Counts its indices from one, in place: those that are given to it once more would be out of range."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1))


def from_one() -> nn.Module:
    return FromOne(2, CLASSES)


def zeros() -> TensorDataset:
    return TensorDataset(torch.zeros(64, dtype=torch.int64), torch.arange(64) % CLASSES)


def scripted() -> nn.Module:
    return torch.jit.script(problems.normalised_classifier())


@pytest.mark.filterwarnings("default:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("model", "algorithm"),
    [
        (in_place, db.Sandblaster(max_iterations=3)),
        (scaling, db.Sandblaster(max_iterations=3)),
        (scripted, db.Downpour()),
    ],
)
def test_models_that_change_their_input_and_scripts_are_trained(model: Any, algorithm: Any, tmp_path: Path) -> None:
    result = db.train(problems.job(model=model, algorithm=algorithm, run=tmp_path / "run"), view=False)
    assert result.summary.examples.missing == 0


def test_what_tries_a_mini_batch_several_times_has_it_each_time_as_it_is() -> None:
    attempt(prepare(problems.job(model=from_one, data=zeros, test=None, algorithm=db.Sandblaster()))[0])


def beside() -> nn.Module:
    """A parameter and a buffer in one memory, beside each other."""
    model = nn.Linear(FEATURES, CLASSES)
    both = torch.zeros(CLASSES * FEATURES + 4)
    model.weight = nn.Parameter(both[:-4].view(CLASSES, FEATURES))
    model.register_buffer("rest", both[-4:])
    return model


def viewing() -> nn.Module:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[2].register_buffer("first", model[2].weight.detach())
    return model


def test_a_buffer_beside_a_parameter_is_no_view_of_it_and_partitions_see_those_that_are(tmp_path: Path) -> None:
    assert prepare(problems.job(model=beside))[1].layout.length == CLASSES * FEATURES + CLASSES
    said = refused(tmp_path, model=viewing, cluster=db.Cluster(replicas=1, partitions=2))
    assert "buffer 2.first is a view of parameter 2.weight" in said


def of_triples(model: nn.Module, batch: Any) -> Tensor:
    inputs, target, weight = batch
    return (nn.functional.cross_entropy(model(inputs), target, reduction="none") * weight).mean()


def test_metrics_beside_a_step_are_of_the_first_two_of_a_mini_batch(tmp_path: Path) -> None:
    job = problems.job(data=weighted, test=weighted, loss=None, step=of_triples, run=tmp_path / "run")
    assert {"loss", "accuracy"} <= db.train(job, view=False).test.keys()


def by_its_input(model: nn.Module, batch: Any) -> Tensor:
    inputs, _ = batch
    inputs = inputs.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    return (slope - 1.0).square().mean()


def by_its_parameters(model: nn.Module, batch: Any) -> Tensor:
    inputs, target = batch
    loss = nn.functional.cross_entropy(model(inputs), target)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.01 * torch.stack([slope.square().sum() for slope in slopes]).sum()


@pytest.mark.parametrize("step", [by_its_input, by_its_parameters])
@pytest.mark.parametrize("algorithm", [db.Downpour(update_rule=db.adagrad(0.05)), db.Sandblaster(max_iterations=9)])
def test_a_step_may_differentiate_by_anything_in_training_and_in_tests(
    step: Any, algorithm: Any, tmp_path: Path
) -> None:
    job = problems.job(loss=None, step=step, metrics={}, algorithm=algorithm, run=tmp_path / "run")
    summary = db.train(job, view=False).summary
    assert summary.test["loss"] < 0.5


def against_its_gradient(model: nn.Module, batch: Any) -> Tensor:
    inputs, target = batch[0].clone().requires_grad_(), batch[1]
    nn.functional.cross_entropy(model(inputs), target).backward()
    assert inputs.grad is not None
    model.zero_grad()
    return nn.functional.cross_entropy(model(inputs.detach() + 0.1 * inputs.grad.sign()), target)


def all_of_a_loop(model: nn.Module, batch: Any) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


@pytest.mark.parametrize("step", [against_its_gradient, all_of_a_loop])
@pytest.mark.parametrize("algorithm", [db.Downpour(), db.Sandblaster()])
def test_a_step_that_calls_backward_is_refused_though_it_takes_the_gradients_back(
    step: Any, algorithm: Any, tmp_path: Path
) -> None:
    said = refused(tmp_path, loss=None, step=step, metrics={}, algorithm=algorithm)
    assert "computing the loss calls backward(), and what that adds to the gradient of" in said
    assert "torch.autograd.grad(loss, inputs)" in said


def with_clipped_weights(model: nn.Module, batch: Any) -> Tensor:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)  # torch counts no change of what is written through `.data`
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_step_that_clips_the_weights_is_refused_though_it_does_so_behind_the_back_of_torch() -> None:
    prepared, _ = prepare(problems.job(loss=None, step=with_clipped_weights, metrics={}))
    with pytest.raises(db.ConfigurationError, match=r"changes parameter .* itself, as .* the clipping of weights do;"):
        attempt(prepared)


class Bound(Dataset[Any]):
    """Examples in a data base whose connection serves one thread only; slow enough to be prepared in another one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.connection: Any = None

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.connection = self.connection or sqlite3.connect(self.path)
        (label,) = self.connection.execute("select label from examples where place = ?", (index,)).fetchone()
        time.sleep(0.0005)
        return torch.full((FEATURES,), float(label)), label


@pytest.mark.slow
def test_a_data_set_that_is_bound_to_a_thread_is_asked_by_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "examples.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table examples (place integer, label integer)")
        connection.executemany("insert into examples values (?, ?)", [(index, index % 3) for index in range(64)])
    connection.close()
    job = problems.job(
        data=functools.partial(Bound, str(path)), test=None, run=tmp_path / "run",
        cluster=db.Cluster(replicas=2, shards=1, threads_per_replica=1),
    )  # fmt: skip
    summary = db.train(job, view=False).summary
    assert (summary.examples.seen, summary.examples.missing, summary.faults) == (128, 0, ())
    assert "none is prepared ahead" in capfd.readouterr().err


def embedding(sparse: bool) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(4, 6, sparse=sparse, mode="sum"), nn.Linear(6, CLASSES))


def tokens() -> TensorDataset:
    inputs, target = problems.points(64).tensors
    return TensorDataset((inputs[:, :4] > 0).long() + 2 * (inputs[:, 4:8] > 0).long(), target)


def test_sandblaster_takes_sparse_gradients_like_dense_ones(tmp_path: Path) -> None:
    losses = [
        db.train(
            problems.job(
                model=functools.partial(embedding, sparse), data=tokens, test=None, run=tmp_path / str(sparse),
                algorithm=db.Sandblaster(max_iterations=10),
            ),
            view=False,
        ).summary.loss
        for sparse in (False, True)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# devices


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("gpu", 'is no device: .*\nhint: use "cpu", "cuda", or None'),
        ("cuda:99", r": this machine has \d+ cuda devices that torch can use\nhint: use Cluster\(device=None\)"),
        ("xpu:99", r": this machine has \d+ xpu devices that torch can use\nhint: use Cluster\(device=None\)"),
        ("mps", r": this machine has 0 mps devices that torch can use\nhint: use Cluster\(device=None\)"),
        ("meta", r": this machine has 0 meta devices that torch can use\nhint: use Cluster\(device=None\)"),
    ],
)
def test_a_device_that_is_not_here_is_refused(device: str, said: str, tmp_path: Path) -> None:
    message = refused(tmp_path, cluster=db.Cluster(replicas=2, device=device))
    assert re.search(rf"(?s)Cluster\(device='{device}'\).*{said}", message)
