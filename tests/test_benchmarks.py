# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' arithmetic, and that every method we compare with runs and ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import distbelief as db
from benchmarks import (
    failures_peers,
    failures_product,
    figure_3,
    memory,
    partition,
    partition_peers,
    partition_product,
    push_fetch_peers,
    rules,
    throughput_peers,
)
from benchmarks.__main__ import main
from benchmarks.memory import held
from benchmarks.processes import Baseline, Companion, CompanionFailed, alive, descendants
from benchmarks.table import (
    Beside,
    Measured,
    document,
    duration,
    interleave,
    machine,
    machine_line,
    ratio,
    spread,
    standing,
    table_text,
    verdict,
)
from distbelief.channel.memory import allocate
from distbelief.partition.units import Numbers
from tests.baselines import odd, with_a_child


def test_a_spread_is_the_middle_and_the_ends_of_its_samples() -> None:
    found = spread([5.0, 1.0, 2.0, 40.0])
    assert (found.median, found.mean, found.low, found.high, found.count) == (3.5, 12.0, 1.0, 40.0, 4)


def test_a_ratio_compares_neighbours_of_one_round_and_not_the_medians() -> None:
    slow_machine_from_the_third_round = Measured((1.0, 1.0, 10.0, 10.0, 10.0))
    method = Measured((1.2, 1.2, 12.0, 12.0, 14.0))
    found = ratio(method, slow_machine_from_the_third_round)
    assert found is not None
    assert found.median == pytest.approx(1.2)
    assert [found.low, found.high] == pytest.approx([1.2, 1.4])
    assert ratio(method, Measured((), "died")) is None


def test_every_method_runs_once_in_each_round_and_each_is_first_in_turn() -> None:
    order: list[str] = []

    def method(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    measured = interleave({name: method(name) for name in "abc"}, 4)
    assert order == list("abcbcacababc")
    assert measured["a"].samples == (1.0, 6.0, 8.0, 10.0)


def test_a_method_that_raises_is_left_out_with_its_reason_and_the_others_go_on() -> None:
    calls: list[int] = []

    def fails_in_the_second_round() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no room\nsecond line")
        return 1.0

    measured = interleave({"good": lambda: 2.0, "bad": fails_in_the_second_round}, 5)
    assert measured["bad"].failure == "OSError: no room"
    assert measured["bad"].spread is None
    assert len(calls) == 2
    assert measured["good"].samples == (2.0,) * 5


def test_no_round_begins_after_the_budget_but_one_always_runs() -> None:
    now = iter(range(0, 1000, 10))
    measured = interleave({"a": lambda: 1.0}, 100, budget_seconds=25.0, clock=lambda: float(next(now)))
    assert len(measured["a"].samples) == 3
    assert len(interleave({"a": lambda: 1.0}, 100, budget_seconds=-1.0)["a"].samples) == 1


def test_further_rounds_are_added_to_the_first() -> None:
    assert Measured((1.0,)).then(Measured((2.0,))) == Measured((1.0, 2.0))
    assert Measured((1.0,)).then(Measured((), "died")).failure == "died"


def test_a_method_timed_beside_another_is_compared_with_the_mean_of_before_and_after() -> None:
    reference = iter([1.0, 3.0, 5.0, 5.0])
    beside = Beside(lambda: 4.0, lambda: next(reference))
    assert [beside(), beside()] == [4.0, 4.0]
    assert beside.ratios == [2.0, 0.8]


def test_a_mean_stands_within_above_or_below_a_range_or_within_the_margin_below_it() -> None:
    plain = spread([0.88, 0.89, 0.90])
    means = [0.91, 0.885, 0.87, 0.86]
    found = [standing(spread([mean]), plain, margin=0.015) for mean in means]
    assert found == ["above", "within", "within 0.015", "below"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push_fetch", "--json", "missing_folder/rows.json"], "create it first"),
        (["push_fetch", "--data", "recordings.tar"], "leave --data out"),
        (["accuracy"], "accuracy needs --data PATH"),
        (["rules"], "rules needs --data PATH"),
        (["speed"], "invalid choice"),
        (["partition", "--picture", "plan.png"], "leave --picture out"),
        (["figure_3", "--picture", "missing_folder/figure_3.png"], "create it first"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_rule_loses_what_lies_between_its_plain_loop_and_many_replicas_and_a_failed_training_says_why() -> None:
    def ended(*outcomes: float | Exception) -> list[Future[float]]:
        futures: list[Future[float]] = [Future() for _ in outcomes]
        for future, outcome in zip(futures, outcomes, strict=True):
            future.set_exception(outcome) if isinstance(outcome, Exception) else future.set_result(outcome)
        return futures

    plain, diverged = rules.collected(ended(0.25, 0.75)), rules.collected(ended(0.25, ValueError("it diverged")))
    assert rules.row(rules.Case(db.adam()), None, plain, plain)["lost"] == 0
    row = rules.row(rules.Case(db.adam()), rules.WAYS[1], rules.collected(ended(0.25, 0.5)), plain)
    assert (row["rule"], row["mean"], row["seeds"], row["lost"]) == ("adam(0.001)", 0.375, 2, 0.125)
    failed = rules.row(rules.Case(db.adam()), rules.WAYS[1], diverged, plain)
    assert (failed["mean"], failed["lost"], failed["failure"]) == (None, None, "ValueError: it diverged")


def test_columns_of_a_table_are_aligned() -> None:
    lines = table_text("title", ["method", "time"], [["a", "1.00 ms"], ["longer name", "9 us"]]).splitlines()
    assert lines == [
        "",
        "title",
        "method          time",
        "-----------  -------",
        "a            1.00 ms",
        "longer name     9 us",
    ]


def test_a_duration_is_told_in_the_unit_that_suits_it() -> None:
    assert [duration(seconds) for seconds in (42e-6, 1.5e-3, 0.0423, 2.0)] == [
        "42 us",
        "1.50 ms",
        "42.3 ms",
        "2000.0 ms",
    ]


def test_a_verdict_is_yes_no_or_none() -> None:
    assert [verdict(reached) for reached in (True, False, None)] == ["yes", "NO", "-"]


def test_the_rows_name_the_machine_and_survive_json() -> None:
    described = machine()
    written = document("push_fetch", True, described, [{"method": "floor", "ratio": 1.0, "failure": None}])
    assert json.loads(json.dumps(written)) == written
    assert written["machine"] == described
    assert f"torch {torch.__version__}" in machine_line(described)
    assert f"cores {described['cores']}" in machine_line(described)


def test_memory_of_ones_own_and_memory_that_is_shared_are_told_apart() -> None:
    before = held(os.getpid())
    own = torch.ones(16_000_000)
    shared = allocate(8_000_000, torch.float32).fill_(1.0)
    after = held(os.getpid())
    assert after.own - before.own == pytest.approx(own.nbytes, rel=0.05)
    assert after.shared - before.shared == pytest.approx(shared.nbytes, rel=0.05)
    assert after.peak >= after.own
    del own
    assert held(os.getpid()).peak >= after.peak - 1e6


def test_the_memory_formulas_are_those_of_the_documentation() -> None:
    number = 4 * 1_000_000
    local, tcp = (memory.formulas(1_000_000, 100, 10, transport) for transport in ("shared_memory", "tcp"))
    assert local["shard"] == (2 * number / 2, 3 * number / 2)
    assert tcp["shard"] == (3 * number / 2, 3 * number / 2)
    assert local["replica"] == tcp["replica"]
    assert 3 * number < local["replica"][0] < 3.1 * number
    assert local["replica"][1] == local["replica"][0] + number
    quarter = memory.formulas(1_000_000, 100, 10, "shared_memory", partitions=4)
    assert quarter["shard"] == local["shard"]
    assert 0.75 * number < quarter["replica"][0] < 0.85 * number


@pytest.mark.slow
def test_each_partition_of_a_replica_holds_its_part_of_three_vectors() -> None:
    watch = memory.watched(512, 2048, "shared_memory", 2, partitions=2)
    assert {kind: len(looks) for kind, looks in watch.seen.items()} == {"shard": 4, "replica": 8}
    parameters = sum(parameter.numel() for parameter in memory.model(512, 2048).parameters())
    assert watch.median("replica").shared == pytest.approx(3 * 4 * parameters / 2, rel=0.05)


@pytest.mark.slow
def test_the_processes_of_a_job_are_told_apart_and_a_replica_shares_three_vectors() -> None:
    watch = memory.watched(512, 2048, "shared_memory", 2)
    assert {kind: len(looks) for kind, looks in watch.seen.items()} == {"shard": 4, "replica": 4}
    parameters = sum(parameter.numel() for parameter in memory.model(512, 2048).parameters())
    assert watch.median("replica").shared == pytest.approx(3 * 4 * parameters, rel=0.05)
    assert watch.median("shard").shared == 0


def test_a_shard_of_the_baselines_takes_the_steps_of_adagrad() -> None:
    gradient = torch.linspace(-1.0, 1.0, 7)
    shard = push_fetch_peers.Shard(7)
    expected, squares = torch.zeros(7), torch.zeros(7)
    for _ in range(3):
        squares += gradient**2
        expected -= 0.01 * gradient / (squares.sqrt() + 1e-10)
        found = shard.apply(gradient)
    torch.testing.assert_close(found, expected)


def test_a_method_that_brings_no_parameters_back_is_refused() -> None:
    for buffer in (torch.zeros(3), torch.tensor([-1.0, -1.0, 0.0])):
        with pytest.raises(RuntimeError, match="must be one negative"):
            push_fetch_peers.check_arrived(buffer)
    push_fetch_peers.check_arrived(torch.full((3,), -0.01))


def test_a_process_counts_as_alive_until_it_is_dead_and_not_when_another_has_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = descendants(os.getpid())[child.pid]
    assert alive(child.pid, started)
    assert not alive(child.pid, "1")
    child.kill()
    deadline = time.monotonic() + 10
    while alive(child.pid, started):
        assert time.monotonic() < deadline, "dead, though nobody has reaped it"
    child.wait()
    assert not alive(child.pid, None)


@pytest.mark.slow
def test_a_job_in_which_a_shard_dies_is_told_with_what_that_cost() -> None:
    outcome = failures_product.disturbed(16_000, 1, db.Faults(kill=((0.6, "shard/0"),)))
    assert (outcome.seen, outcome.missing, outcome.losses) == (16_000, 0, 1)
    assert outcome.back_seconds is not None
    assert 0 < outcome.back_seconds < outcome.seconds


@pytest.mark.slow
def test_a_job_whose_coordinator_dies_is_resumed_to_its_last_example() -> None:
    outcome, gone_seconds = failures_product.coordinator_killed(4000, 2)
    assert (outcome.seen, outcome.missing) == (8000, 0)
    assert gone_seconds < 10
    assert outcome.back_seconds is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("baseline", "arguments", "questions"),
    [
        (failures_peers.data_parallel, {"steps": 30}, [((1.0,), 0.5, 5.0), ((0.0,), 0.0, 30.0)]),  # still, then killed
        (failures_peers.server, {"steps": 30}, [((), 0.0, 30.0)]),
        (failures_peers.elastic, {"seconds": 2}, [((), 0.5, 60.0)]),
    ],
    ids=["data parallel", "server", "elastic"],
)
def test_each_way_that_torch_brings_tells_of_its_dead(
    baseline: Baseline, arguments: dict[str, int], questions: list[tuple[tuple[float, ...], float, float]]
) -> None:
    with Companion(baseline, pauses=False, **arguments) as companion:
        for question, low, high in questions:
            assert low < companion.ask(*question) < high


def test_the_synthetic_speech_task_has_the_shape_of_the_real_one() -> None:
    inputs, targets = throughput_peers.synthetic_frames(100)
    scores = throughput_peers.acoustic_model()(inputs)
    assert inputs.shape == (100, 440)
    assert scores.shape == (100, 10)
    assert set(targets.tolist()) <= set(range(10))
    assert sum(parameter.numel() for parameter in throughput_peers.acoustic_model().parameters()) == (
        440 * 512 + 3 * 512 * 512 + 512 * 10 + 4 * 512 + 10
    )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "message"), [(2, "ValueError: two is even"), (4, "no answer in 1 s"), (6, "process ended with -9")]
)
def test_a_companion_that_fails_says_how_and_is_ended(request_: int, message: str) -> None:
    with Companion(odd) as companion:
        assert companion.ask(3) == 3.0
        with pytest.raises(CompanionFailed, match=message):
            companion.ask(request_, deadline_seconds=1.0)
        companion.close()
        assert companion.returncode is not None


@pytest.mark.slow
def test_what_a_companion_forked_ends_with_it_and_with_us() -> None:
    with Companion(with_a_child) as companion:
        child = int(companion.ask())
        assert is_alive(child)
    assert not is_alive(child)

    script = (
        "import os, signal; from benchmarks.processes import Companion\n"
        "from tests.baselines import with_a_child\n"
        "print(int(Companion(with_a_child).ask()), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, check=False, timeout=60)
    child = int(ended.stdout)
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


@pytest.mark.slow
@pytest.mark.parametrize(
    "baseline",
    [push_fetch_peers.bare_socket, push_fetch_peers.gloo, push_fetch_peers.rpc],
    ids=lambda one: one.__name__,
)
def test_each_transport_pushes_and_fetches_at_two_sizes(baseline: Baseline) -> None:
    with Companion(baseline) as companion:
        assert 0 < companion.ask(100, 3) < 1
        assert 0 < companion.ask(50_000, 2) < 1


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_pushes_and_fetches_and_leaves_no_process() -> None:
    pytest.importorskip("ray")
    with Companion(push_fetch_peers.ray, pauses=False, object_store_bytes=100_000_000) as companion:
        assert 0 < companion.ask(50_000, 2) < 1
        left = companion.descendants()
        assert left
    assert not [pid for pid in left if is_alive(pid)]


@pytest.mark.slow
def test_the_plain_loop_and_data_parallel_train_and_a_slow_process_slows_both() -> None:
    for loops in (throughput_peers.plain, throughput_peers.two_plain):
        with Companion(loops, frames=500) as companion:
            assert companion.ask(32, 0.2) > 0
            processes = companion.descendants()
        assert len(processes) == (1 if loops is throughput_peers.two_plain else 0)
        assert not [pid for pid in processes if is_alive(pid)]
    with Companion(throughput_peers.data_parallel, frames=500) as companion:
        assert companion.ask(32, 0.5, 1.0) > 1.3 * companion.ask(32, 0.5, 20.0)


def test_two_partitions_reach_their_targets_when_they_are_so_many_times_as_fast_in_the_median_round() -> None:
    case = partition.Case("speech 2048", 256)
    one, two, tensor = Measured((4.0, 4.0, 4.0)), Measured((2.0, 3.0, 9.0)), Measured((2.5, 2.7, 2.8))
    measured = {partition.ONE: one, partition.units_of(2): two, partition.TENSOR: tensor}
    assert partition.is_reached(case, measured, partition.units_of(2)) is True
    slower = {**measured, partition.TENSOR: Measured((1.5, 2.6, 2.8))}
    assert partition.is_reached(case, slower, partition.units_of(2)) is False
    assert partition.is_reached(case, {**measured, partition.ONE: Measured((), "died")}, partition.units_of(2)) is False
    assert partition.is_reached(case, measured, partition.TENSOR) is None
    assert partition.is_reached(partition.Case("speech 512", 128), measured, partition.units_of(2)) is None


def test_a_supposed_machine_takes_time_for_operations_messages_and_bytes_forward_and_backward() -> None:
    supposed = figure_3.Machine("slow", operations_per_second=1e6, bytes_per_second=1e5, message_seconds=1e-3)
    numbers = Numbers(0, operations=50, elements_in=7, elements_out=5, messages_in=2, messages_out=4)
    batch = figure_3.BATCH_SIZE
    assert supposed.seconds(numbers) == pytest.approx(3 * 50 * batch / 1e6 + 2 * (6e-3 + 7 * batch * 4 / 1e5))


def test_the_models_of_figure_3_have_the_sizes_that_the_paper_names() -> None:
    sizes = [model.parameters for model in figure_3.models()]
    assert sizes[0] == 41_777_152
    assert sizes[1:] == [pytest.approx(size, rel=0.02) for size in (80e6, 330e6, 1.7e9)]


@pytest.mark.slow
def test_figure_3_is_predicted_for_every_model_and_supposition_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = figure_3.run(quick=True)
    assert len(rows) == len(figure_3.SUPPOSED) * 4 * len(figure_3.QUICK_MACHINES)
    assert {row["speed-up"] for row in rows if row["machines"] == 1} == {1.0}
    most = {str(row["model"]): float(str(row["speed-up"])) for row in rows if row["machines"] == 16}
    assert most["vision, 1.7 billion"] > 2 * most["speech, 42 million"]
    figure_3.draw(rows, tmp_path / "figure_3.png")
    assert (tmp_path / "figure_3.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "partitions"), [("speech 32", 1), ("speech 32", 3), (partition_peers.LOCAL, 2)])
def test_the_partitions_of_the_benchmark_send_what_their_plan_says(model: str, partitions: int) -> None:
    with Companion(partition_product.by_units, model=model, batch_size=4, partitions=partitions) as companion:
        predicted = companion.ask("predicted", 1)
        assert companion.ask("counted", 1) == predicted
        assert (predicted > 0) == (partitions > 1)
        assert 0 < companion.ask("seconds", 2) < 5


@pytest.mark.slow
def test_the_other_ways_to_cut_a_model_compute_mini_batches() -> None:
    with Companion(partition_peers.one_process, model="speech 32", batch_size=8) as companion:
        assert 0 < companion.ask(2) < 5
    for baseline in (partition_peers.tensor_parallel, partition_peers.pipelining):
        with Companion(baseline, model="speech 32", batch_size=8, partitions=2) as companion:
            assert 0 < companion.ask(2) < 5
