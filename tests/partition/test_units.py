# SPDX-License-Identifier: Apache-2.0
"""Laws of the plan of a model cut by units: who owns what, what is random, what is refused."""

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from law import check, place, values_of
from threads import together
from torch import Tensor, nn
from torch.nn import functional

from distbelief.errors import ConfigurationError
from distbelief.layers import LocallyConnected2d
from distbelief.partition import rules as rules_package
from distbelief.partition.box import Box, sizes
from distbelief.partition.group import Group
from distbelief.partition.rules import register_rule
from distbelief.partition.site import Part, Site, State, part
from distbelief.partition.units import units
from distbelief.plan import Cut, channels, grid, on, rows


def perceptron(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [[nn.Linear(*pair), nn.Sigmoid()] for pair in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*layers))


# who owns what


def test_pieces_cover_every_parameter_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.Flatten(), nn.Linear(24 * 16, 50), nn.Linear(50, 3)
    )
    blueprint = units(model, torch.zeros(8, 1, 6, 6), 4)
    covered = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for index in range(4):
        for piece in blueprint.pieces(index):
            covered[piece.name].view(piece.full_shape)[place(piece)] += 1
    assert all(bool((times == 1).all()) for times in covered.values())


def test_frozen_parameters_are_held_but_not_owned_and_get_no_gradient() -> None:
    model = perceptron(6, 20, 20)
    model[0].requires_grad_(False)
    blueprint = units(model, torch.zeros(4, 6), 2)
    assert {piece.name for piece in blueprint.pieces(0)} == {"2.weight", "2.bias"}
    assert {piece.name for piece in blueprint.frozen(0)} == {"0.weight", "0.bias"}
    assert sum(numbers.parameters for numbers in blueprint.numbers) == 20 * 21
    check(model.double(), torch.randn(4, 6, dtype=torch.float64), 2)


def test_the_parameters_of_a_share_are_views_of_the_values_it_was_given() -> None:
    model = perceptron(6, 20, 20)
    blueprint = units(model, torch.zeros(4, 6), 2)
    values = values_of(model, blueprint, 0)
    share = blueprint.share(0, values, Group(None, 0, 1))
    values["2.bias"].fill_(3.0)
    assert share.parameters_by_name["2.bias"].tolist() == [3.0] * 10
    assert dict(share.named_parameters()).keys() != values.keys()
    assert {id(held) for held in share.parameters()} == {id(held) for held in share.parameters_by_name.values()}


def test_the_heads_of_an_attention_hold_their_query_key_and_value_together() -> None:
    model = nn.Sequential(nn.Linear(4, 12), Attention())
    pieces = {piece.name: piece for piece in units(model, torch.zeros(2, 5, 4), 3).pieces(1)}
    weight = pieces["1.attention.in_proj_weight"]
    assert (weight.box, weight.full_shape) == (((0, 3), (4, 8), (0, 12)), (3, 12, 12))
    assert pieces["1.attention.in_proj_bias"].box == ((0, 3), (4, 8))


class Attention(nn.Module):
    """Three heads of four."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_small_layers_stay_on_one_partition_where_their_input_is_if_it_is_on_one() -> None:
    model = perceptron(6, 40, 7, 5)
    blueprint = units(model, torch.zeros(4, 6), 4)
    holders = {layer.name: [box is not None for box in layer.boxes] for layer in blueprint.layers}
    assert holders["0"] == [True] * 4
    assert holders["2"] == holders["4"] == [False, False, False, True]
    moved = units(model, torch.zeros(4, 6), 4, {"2": on(1)})
    assert [layer.boxes[1] for layer in moved.layers if layer.name == "4"] == [((0, 5),)]


def test_a_narrow_layer_that_is_next_to_no_work_stays_on_one_partition() -> None:
    model = perceptron(300, 300, 100, 16)
    holders = {
        layer.name: sum(box is not None for box in layer.boxes) for layer in units(model, torch.zeros(4, 300), 2).layers
    }
    assert holders["0"] == holders["2"] == holders["4"] == 2
    model = perceptron(300, 1000, 1000, 1000, 16)
    blueprint = units(model, torch.zeros(4, 300), 2)
    holders = {layer.name: sum(box is not None for box in layer.boxes) for layer in blueprint.layers}
    assert holders["4"] == 2
    assert holders["6"] == 1
    assert [(each.elements_out, each.elements_in) for each in blueprint.numbers] == [(1500, 1000), (1000, 1500)]
    by_hand = units(model, torch.zeros(4, 300), 2, {"6": rows()})
    assert [(each.elements_out, each.elements_in) for each in by_hand.numbers] == [(1508, 1500), (1500, 1508)]


def test_states_that_several_layers_need_cross_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.stem(x))
            return self.a(x) + self.b(x) * x

    blueprint = check(Branches().double(), torch.randn(3, 4, dtype=torch.float64), 2)
    assert [(n.elements_in, n.elements_out) for n in blueprint.numbers] == [(16, 32), (32, 16)]


def test_fields_that_overlap_cross_once_where_the_box_around_them_is_no_more() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = LocallyConnected2d(1, 2, (4, 16), 1)
            self.near, self.far = LocallyConnected2d(2, 2, (4, 16), 3, 1, 1), LocallyConnected2d(2, 2, (4, 16), 7, 1, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.near(x) + self.far(x)

    cuts = {"stem": grid(1, 2), "near": grid(1, 2), "far": grid(1, 2)}
    blueprint = check(Scales().double(), torch.randn(3, 1, 4, 16, dtype=torch.float64), 2, cuts)
    halo, gathered = 2 * 4 * 3, 2 * 4 * 8
    assert [(n.elements_in, n.elements_out) for n in blueprint.numbers] == [
        (halo, halo + gathered),
        (halo + gathered, halo),
    ]


def test_a_model_of_four_billion_parameters_is_planned_without_any_of_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**15, 2**16), nn.ReLU(), nn.Linear(2**16, 2**15))
    numbers = units(model, torch.empty(2, 2**15, device="meta"), 8).numbers
    assert sum(each.parameters for each in numbers) == 2**32 + 2**16 + 2**15
    assert {each.operations for each in numbers} == {2 * 2**32 // 8}


def test_work_is_counted_as_the_textbook_says() -> None:
    model = nn.Sequential(LocallyConnected2d(3, 8, 12, 5), nn.Flatten(), nn.Linear(8 * 64, 40))
    first, second = units(model, torch.zeros(4, 3, 12, 12), 2).numbers
    assert first.operations == second.operations == 2 * (4 * 8 * 75 * 8) + 2 * 512 * 20


def test_a_mini_batch_may_be_shorter_than_the_sample() -> None:
    model = perceptron(6, 20, 20)
    blueprint, x = units(model, torch.zeros(64, 6), 2), torch.randn(1, 6)

    def work(group: Group) -> Tensor:
        share = blueprint.share(group.index, values_of(model, blueprint, group.index), group)
        return torch.cat([share(x), share(x.expand(3, -1))])

    torch.testing.assert_close(together(2, work)[1], model(x).expand(4, -1))


# what is random


class Dropping(nn.Module):
    """Dropout of units, of channels, as a function, and of attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Sequential(nn.Conv2d(1, 24, 3, padding=1), nn.Dropout2d(0.4), nn.Flatten())
        self.units = nn.Sequential(nn.Linear(24 * 16, 36), nn.Dropout(0.3), nn.Linear(36, 36))
        self.sequence = nn.Sequential(nn.Linear(6, 12), Attention(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.dropout(self.units(self.plane(x)), 0.25, training=self.training)
        return self.sequence(x.unflatten(1, (6, 6)))


def outputs(model: nn.Module, x: Tensor, partitions: int, steps: int = 2, seed: int = 5) -> tuple[list[Tensor], Tensor]:
    """The outputs of training steps, and then of an evaluation."""
    blueprint = units(model, x, partitions)

    def work(group: Group) -> tuple[list[Tensor], Tensor]:
        share = blueprint.share(group.index, values_of(model, blueprint, group.index), group, seed=seed)
        training = [share(x).detach() for _ in range(steps)]
        with torch.no_grad():
            return training, share.eval()(x)

    return together(partitions, work)[blueprint.out]


def dropping() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(4)
    return Dropping().double(), torch.randn(5, 1, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("partitions", [2, 3, 4])
def test_the_cut_does_not_change_what_dropout_drops(partitions: int) -> None:
    (first, second), evaluation = outputs(*dropping(), partitions)
    (whole_first, whole_second), whole_evaluation = outputs(*dropping(), 1)
    torch.testing.assert_close(first, whole_first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, whole_second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evaluation, whole_evaluation, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first, second)


def test_another_seed_drops_others_and_evaluation_drops_nothing() -> None:
    model, x = dropping()
    (first, _), evaluation = outputs(model, x, 2)
    (other, _), _ = outputs(model, x, 2, seed=6)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(evaluation, model.eval()(x).detach(), rtol=1e-12, atol=1e-12)


def test_dropout_drops_at_its_rate_and_scales_the_rest_and_a_step_can_be_repeated() -> None:
    model = nn.Sequential(nn.Linear(1, 400), nn.Dropout(0.3))
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    blueprint, x = units(model, torch.zeros(50, 1), 2), torch.zeros(50, 1)

    def work(group: Group) -> list[Tensor]:
        share = blueprint.share(group.index, values_of(model, blueprint, group.index), group)
        found = [share(x).detach(), share(x).detach()]
        anew = blueprint.share(group.index, values_of(model, blueprint, group.index), group)
        return [*found, anew(x).detach()]

    first, second, again = together(2, work)[1]
    kept = first != 0
    assert float(kept.double().mean()) == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.7))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# rules of the user


class Scaled(nn.Module):
    """A layer with a parameter per unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0) * self.gain


def scaled(site: Site, x: State) -> State:
    def pieces(box: Box) -> Mapping[str, Part]:
        return {"gain": part(site.module, "gain", box)}

    division = site.choose(x, {"rows": lambda: site.along(-1)}, len(site.module.gain))
    return site.compute([x], division, lambda box: Scaled(*sizes(box)), need=lambda box: [box], pieces=pieces)


def greedy(site: Site, x: State) -> State:
    """Hands every partition the whole parameter."""
    width = len(site.module.gain)
    return site.compute(
        [x],
        site.along(-1),
        lambda box: Scaled(width),
        pieces=lambda box: {"gain": part(site.module, "gain", ((0, width),))},
    )


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that are registered in a test are gone after it."""
    monkeypatch.setattr(rules_package, "_MODULES", dict(rules_package._MODULES))


@pytest.mark.usefixtures("forgotten")
def test_a_layer_of_the_user_is_cut_by_the_rule_he_registers() -> None:
    model = nn.Sequential(nn.Linear(3, 20), Scaled(20), nn.Linear(20, 2)).double()
    register_rule(Scaled, scaled)
    blueprint = check(model, torch.randn(5, 3, dtype=torch.float64), 3)
    assert [piece.box for index in range(3) for piece in blueprint.pieces(index) if piece.name == "1.gain"] == [
        ((0, 7),), ((7, 14),), ((14, 20),),
    ]  # fmt: skip


@pytest.mark.usefixtures("forgotten")
def test_a_rule_that_hands_a_parameter_out_twice_is_refused() -> None:
    register_rule(Scaled, greedy)
    with pytest.raises(ConfigurationError, match=r"the rule for 1\.gain hands out 40 of its 20 elements"):
        units(nn.Sequential(nn.Linear(3, 20), Scaled(20)), torch.zeros(2, 3), 2)


# what is refused


class Tied(nn.Module):
    """Scores with the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Embedding(9, 16), nn.Linear(16, 9, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.embed(x))


class Reused(nn.Module):
    """Uses the weight of a layer by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.layer(x), self.layer.weight)


class Forwarded(nn.Module):
    """A linear layer and whatever is to be done with it."""

    def __init__(self, forward: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.layer, self.do = nn.Linear(4, 16), forward
        self.unused: nn.Parameter | None = None

    def forward(self, x: Tensor) -> object:
        return self.do(self.layer, x)


def hooked() -> nn.Module:
    model = perceptron(4, 16)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def hooked_back() -> nn.Module:
    model = perceptron(4, 16)
    model[0].register_full_backward_hook(lambda module, before, after: None)
    return model


def hooked_whole() -> nn.Module:
    model = perceptron(4, 16)
    model.register_forward_pre_hook(lambda module, args: args)
    return model


class Halting(nn.Sequential):
    """Its statistics are those that it was given, as when a model that was trained before is trained on."""

    def train(self, mode: bool = True) -> "Halting":
        super().train(mode)
        self[1].eval()
        return self


def halting() -> nn.Module:
    return Halting(nn.Linear(4, 16), nn.BatchNorm1d(16))


class Offset(nn.Module):
    """Looks up a number of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.register_buffer("offsets", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.offsets[1]


def tied_buffers() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    model[2].running_mean = model[1].running_mean
    return model


def with_unused() -> nn.Module:
    model = Forwarded(lambda layer, x: layer(x))
    model.unused = nn.Parameter(torch.zeros(3))
    return model


def overwritten(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer(x)
    return y.mul_(2) + y


def by_training(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.relu(layer(x)) if layer.training else layer(x)


TEXT, ROWS, PLANES = torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 4), torch.zeros(4, 3, 8, 8)

REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, int, dict[str, Cut], str, str]] = {
    "no rule": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.GroupNorm(4, 16)), ROWS, 2, {},
        r"layer 1 \(GroupNorm\) has no unit rule", "register a rule for the layer with register_rule",
    ),
    "no rule for its parameters": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.PReLU(16)), ROWS, 2, {},
        r"layer 1 \(PReLU\) has no unit rule", "register a rule .* or cut the model by layers with Plan.stages",
    ),
    "random": (
        lambda: Forwarded(lambda layer, x: layer(x) + torch.rand_like(x).sum()), ROWS, 2, {},
        "layer rand_like draws random numbers", "register a rule .* or .* Plan.stages",
    ),
    "random module": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.AlphaDropout(0.2)), ROWS, 2, {},
        r"layer 1 \(AlphaDropout\) draws random numbers", "Plan.stages",
    ),
    "values": (
        lambda: Forwarded(lambda layer, x: layer(x) if x.sum() > 0 else x), ROWS, 2, {},
        "the forward pass of Forwarded cannot be followed by units", "Plan.stages",
    ),
    "items": (
        lambda: Forwarded(lambda layer, x: layer(x) * x.sum().item()), ROWS, 2, {},
        "item cannot be planned without computing it", "Plan.stages",
    ),
    "another pass in evaluation": (
        lambda: Forwarded(by_training), ROWS, 2, {},
        "calls other layers in evaluation than in training", "Plan.stages",
    ),
    "called twice": (
        lambda: Forwarded(lambda layer, x: layer(layer(x)[:, :4])), ROWS, 2, {},
        "module layer is called twice in the forward pass", "a layer of its own, .* Plan.stages",
    ),
    "tied": (
        Tied, TEXT, 2, {},
        r"parameters embed\.weight and score\.weight are one", "its own parameter, .* Plan.stages",
    ),
    "used twice": (
        Reused, ROWS, 2, {}, r"parameter layer\.weight is used twice", "a layer of its own, .* Plan.stages",
    ),
    "unused": (
        with_unused, ROWS, 2, {}, "parameter unused takes no part in the forward pass", "remove it, or freeze it",
    ),
    "overwritten": (
        lambda: Forwarded(overwritten), ROWS, 2, {},
        "add uses a value that mul_ has overwritten in place", "use the result of the call",
    ),
    "hooked": (hooked, ROWS, 2, {}, "module 0 has forward hooks", "a module of its own"),
    "hooked on the way back": (
        hooked_back, ROWS, 2, {}, "module 0 has backward hooks", "a module of its own, .* Plan.stages",
    ),
    "hooked as a whole": (hooked_whole, ROWS, 2, {}, "the model itself has forward pre hooks", "a module of its own"),
    "a mode of its own": (
        halting, ROWS, 2, {}, r"train\(True\) leaves module 1 in evaluation", "derived from the layer's",
    ),
    "a tensor made of a buffer": (
        Offset, ROWS, 2, {}, "the forward pass of Offset computes with a tensor of its own, or one made of a buffer",
        "register it as a buffer, .* Plan.stages",
    ),
    "tied buffers": (
        tied_buffers, ROWS, 2, {}, r"buffers 1\.running_mean and 2\.running_mean are one", "its own buffer",
    ),
    "several outputs": (
        lambda: Forwarded(lambda layer, x: (layer(x), x)), ROWS, 2, {},
        "the model returns tuple; a model cut by units returns one tensor", "let forward return one tensor",
    ),
    "no batch in the output": (
        lambda: Forwarded(lambda layer, x: layer(x).mean()), ROWS, 2, {},
        "the model returns something that is no tensor with the batch in front", "let forward return one tensor",
    ),
    "an ill-fitting sample": (
        lambda: perceptron(5, 16), ROWS, 2, {}, "0 cannot be planned without computing it: RuntimeError",
        "give a sample like the model's mini-batches",
    ),
    "more partitions than units": (
        lambda: perceptron(4, 8, 2), ROWS, 9, {},
        "the model has units for 1 of 9 partitions; partition 0 would have nothing to compute", "use fewer partitions",
    ),
    "more partitions than layers": (
        lambda: perceptron(4, 8, 8), ROWS, 3, {"0": on(0), "2": on(1)},
        "the model has units for 2 of 3 partitions; partition 2 would", "use fewer partitions",
    ),
    "more partitions than rows": (
        lambda: perceptron(4, 3, 40), ROWS, 4, {"0": rows()},
        r"layer 0 \(Linear\) has too few units for rows\(\): 1 of 4 partitions would have none", "at most 3 partitions",
    ),
    "a missing module": (
        lambda: perceptron(4, 16), ROWS, 2, {"fc1": rows()},
        "the plan cuts 'fc1', but Sequential has no module of that name", "did you mean '0' or '1'",
    ),
    "a misspelt module": (
        Reused, ROWS, 2, {"layers": rows()}, "no module of that name", "did you mean 'layer'",
    ),
    "a missing partition": (
        lambda: perceptron(4, 16), ROWS, 2, {"0": on(2)},
        r"the plan puts '0' on\(2\), but the partitions are 0 to 1", r"on\(0\) to on\(1\)",
    ),
    "a plane of rows": (
        lambda: perceptron(4, 16), ROWS, 4, {"0": grid(2, 2)},
        r"layer 0 \(Linear\) cannot be cut by grid\(2, 2\)", r"cut it by one of rows\(\), on\(partition\)",
    ),
    "rows of a plane": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), PLANES, 2, {"0": rows()},
        r"layer 0 \(Conv2d\) cannot be cut by rows\(\)", r"one of channels\(\), grid\(\.\.\.\), on\(partition\)",
    ),
    "too many tiles": (
        lambda: nn.Sequential(LocallyConnected2d(3, 8, 8, 3)), PLANES, 4, {"0": grid(2, 3)},
        r"cannot be cut by grid\(2, 3\): 6 tiles for 4 partitions", r"grid\(2, 2\)",
    ),
    "too small a plane": (
        lambda: nn.Sequential(LocallyConnected2d(3, 8, 8, 6)), PLANES, 4, {"0": grid(4, 1)},
        r"has too few units for grid\(4, 1\): 1 of 4 partitions", "at most 3 partitions",
    ),
    "fewer groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, groups=3)), PLANES, 4, {"0": channels()},
        r"has too few units for channels\(\)", r"on\(partition\)",
    ),
    "a container": (
        lambda: nn.Sequential(perceptron(4, 16)), ROWS, 2, {"0": rows()},
        r"the plan cuts '0' by rows\(\), but it is a Sequential of several layers", "by their own names",
    ),
    "a layer that is not cut": (
        lambda: nn.Sequential(nn.Linear(4, 16), nn.Softmax(1)), ROWS, 2, {"1": channels()},
        r"layer 1 \(Softmax\) cannot be cut by channels\(\)", r"on\(partition\), or not at all",
    ),
    "the batch second": (
        lambda: Attentive(nn.MultiheadAttention(4, 2)), torch.zeros(4, 5, 4), 2, {},
        r"layer attention \(MultiheadAttention\) is not of the kind", "use batch_first=True",
    ),
    "weights of attention": (
        lambda: Attentive(nn.MultiheadAttention(4, 2, batch_first=True), 1), torch.zeros(4, 5, 4), 2, {},
        "returns its weights", "need_weights=False",
    ),
    "renormalised rows": (
        lambda: nn.Sequential(nn.Embedding(9, 16, max_norm=1.0)), TEXT, 2, {}, "renormalises rows", "max_norm=None",
    ),
}  # fmt: skip


class Attentive(nn.Module):
    """One of the results of an attention."""

    def __init__(self, attention: nn.Module, which: int = 0) -> None:
        super().__init__()
        self.attention, self.which = attention, which

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x)[self.which]
        return found * 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_by_name_and_the_hint_says_what_to_do(name: str) -> None:
    model, sample, partitions, cuts, problem, hint = REFUSED[name]
    with pytest.raises(ConfigurationError, match=problem) as caught:
        units(model(), sample, partitions, cuts)
    assert caught.match(f"hint: .*{hint}")
