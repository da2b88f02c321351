"""A bench: who is measured when, where a step's seconds went, and what is made of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import local_fleet
import numpy as np
import pytest
import toys
import yaml
from rich.console import Console

from mpsl_dist.__main__ import main
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis import bench, stopwatch
from mpsl_dist.analysis.bench_report import Report, Setting, peak_of, spread, typical
from mpsl_dist.analysis.stopwatch import PHASES, Timed, Turn, Watch, split
from mpsl_dist.config import to_dict
from mpsl_dist.methods import centralized
from mpsl_dist.methods.hosting import Setup
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.average import trainable_state
from mpsl_dist.runtime import launch

# -- the watch ---------------------------------------------------------------------------------


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass; none passes otherwise."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(stopwatch, "time", clock)

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_phase_within_another_counts_for_itself_alone(wait: Callable) -> None:
    watch = Watch()
    with watch.phase("rest"):
        wait(1)
        with watch.phase("forward"):
            wait(2)
            with watch.phase("rest"):
                wait(4)
        wait(8)
    wait(16)
    assert watch.take() == ({"rest": 13.0, "forward": 2.0}, {})
    assert watch.take() == ({}, {})


def test_threads_have_phases_of_their_own_and_failures_end_theirs(wait: Callable) -> None:
    watch, owner = Watch(), SimpleNamespace(work=wait, begin=lambda: lambda: wait(3))
    watch.lay(owner, "work", "data")
    watch.lay_wait(owner, "begin", "owners")
    thread = threading.Thread(target=lambda: (owner.work(5), owner.begin()()))
    with pytest.raises(ZeroDivisionError), watch.phase("rest"):
        thread.start()
        thread.join()
        raise ZeroDivisionError
    owner.work(1)
    assert watch.take() == ({"rest": 8.0, "data": 1.0}, {"data": 5.0, "owners": 3.0})


def test_the_slowest_workers_time_is_taken_off_the_round_trip() -> None:
    own = {"rest": 1.0, "send": 10.0, "forward": 4.0}
    found = split(own, {}, [{"data": 2.0, "tokenize": 5.0, "loss": 9.0}])
    assert found["data"] == 2 and found["tokenize"] == 5 and found["send"] == 3
    assert list(found) == list(PHASES) and sum(found.values()) == 15


def test_overlapping_threads_share_what_the_step_waited_for_them() -> None:
    own, others = {"rest": 10.0, "owners": 2.0}, {"send": 8.0, "forward": 20.0, "rest": 12.0}
    found = split(own, others, [{"tokenize": 4.0}, {"data": 1.0, "tokenize": 3.0}])
    assert sum(found.values()) == pytest.approx(12)
    assert found["owners"] == 2 and found["forward"] == pytest.approx(20 / 40 * 10)
    assert found["tokenize"] == pytest.approx(7 / 40 * 10) and found["send"] == 0


@pytest.mark.parametrize("method", [Mpsl, Psl])
def test_the_watch_finds_every_phase_and_changes_nothing(
    method: type[Mpsl], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = method.__name__.lower()
    chosen = toys.experiment(method=name, tokenizer_sync={"mode": "gradients", "every": 2})
    plain = local_fleet.in_one_process(chosen, method)
    monkeypatch.setattr(local_fleet, "build_clients", stopwatch.build_timed_clients)
    watched = local_fleet.in_one_process(chosen, method)
    watched.clients.fleet.hosted = {"worker1": [0, 1], "worker2": [2, 3]}
    timed = Timed(watched, "cpu")
    for one in (plain, watched):
        one.begin_epoch(0)
    for step in range(2):
        turn, before = timed.turn(step, step), plain.traffic.totals()
        plain.step(step, step)
        assert sum(turn.phases.values()) == pytest.approx(turn.seconds)
        assert min(turn.phases.values()) >= 0
        assert all(turn.phases[phase] > 0 for phase in PHASES if phase != "send")
        assert all(turn.slowest_worker[phase] > 0 for phase in ("data", "loss", "owners"))
        assert turn.sent == plain.traffic.since(before)["by_kind"]
    ours, theirs = trainable_state(watched.server.model), trainable_state(plain.server.model)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_centralized_training_spends_nothing_on_sending() -> None:
    chosen = toys.experiment(method="centralized")
    method = centralized.build(Setup(chosen, Holdings.load(chosen), 1))
    method.begin_epoch(0)
    turn = Timed(method, "cpu").turn(0, 0)
    assert sum(turn.phases.values()) == pytest.approx(turn.seconds)
    assert {phase for phase in PHASES if not turn.phases[phase]} == {"send"}
    assert turn.sent == {} and turn.slowest_worker == {}


# -- the rounds --------------------------------------------------------------------------------


class Recorder:
    """Stands for a timed method: notes its turns in a list that all share."""

    def __init__(self, name: str, noted: list) -> None:
        self.name, self.noted = name, noted
        # The last step of an epoch has only half of a global batch.
        self.plan, self.method = np.array([[4, 4], [4, 4], [2, 2]]), self

    def begin_epoch(self, epoch: int) -> None:
        self.noted.append((self.name, "epoch", epoch))

    def turn(self, epoch_step: int, number: int) -> tuple[int, int]:
        self.noted.append((self.name, epoch_step, number))
        return epoch_step, number


def test_rounds_come_in_every_order_without_the_warm_up_and_half_batches() -> None:
    noted: list = []
    turns = bench.measure({name: Recorder(name, noted) for name in "abc"}, 9)
    steps = [(0, 0), (1, 1), (0, 3), (1, 4), (0, 6), (1, 7), (0, 9), (1, 10), (0, 12)]
    later = [(1, 13), (0, 15), (1, 16)]
    assert turns == dict.fromkeys("abc", [*steps, *later][bench.WARM_UP :])
    taken = [entry for entry in noted if entry[1] != "epoch"]
    orders = ["".join(name for name, *_ in taken[i : i + 3]) for i in range(0, 36, 3)]
    assert orders == 2 * ["".join(order) for order in permutations("abc")]
    assert noted[:3] == [(name, "epoch", 0) for name in "abc"]


# -- what is made of it ------------------------------------------------------------------------


def _turn(seconds: float, **sent: int) -> Turn:
    phases = dict.fromkeys(PHASES, 0.0) | {"forward": 0.25 * seconds, "rest": 0.75 * seconds}
    return Turn(seconds, phases, {}, sent)


def _report(gpu: str | None = None, slow: float = 2.0) -> Report:
    seconds = [1.0, 1.0, 2.0, 4.0]
    turns = {
        "mpsl": [_turn(slow * s, activations=4, predictions=2) for s in seconds],
        "centralized": [_turn(s) for s in seconds],
    }
    about = {"dataset": "toys", "encoder": "Ti", "clients": 4, "workers": 2}
    environment = {"devices": {"server": "cpu"}}
    setting = Setting("toy", about, environment, gpu, 30, 10**12, 3)
    return Report(setting, turns, {"server": {"resident": 2**20}})


def test_spread_is_median_quartiles_extremes_and_mean() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 9.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 5.0,
        "least": 1.0,
        "most": 9.0,
        "mean": 4.0,
    }


@pytest.mark.parametrize("count, kept", [(1, [0]), (2, [0, 1]), (4, [1, 2]), (9, [2, 3, 4, 5, 6])])
def test_typical_turns_are_the_middle_half(count: int, kept: list[int]) -> None:
    turns = [_turn(float(n)) for n in reversed(range(count))]
    assert [turn.seconds for turn in typical(turns)] == kept


def test_figures_put_methods_beside_each_other() -> None:
    figures = _report(gpu="NVIDIA H200", slow=3.0).figures
    mpsl = figures["methods"]["mpsl"]
    assert figures["ratios"]["mpsl/centralized"]["median"] == 3
    assert mpsl["seconds"]["median"] == 4.5 and mpsl["seconds"]["each"] == [3, 3, 6, 12]
    assert mpsl["samples_per_second"] == pytest.approx(30 / 4.5)
    assert sum(mpsl["phases"].values()) == pytest.approx(4.5)
    by_kind = {"activations": 4, "predictions": 2}
    assert mpsl["bytes_per_step"] == {"up": 4, "down": 2, "by_kind": by_kind}
    assert mpsl["flop_per_second"] == pytest.approx(1e12 * 30 / 4.5)
    assert mpsl["share_of_bf16_peak"] == pytest.approx(1e12 * 30 / 4.5 / 989.5e12)


def test_the_table_shows_medians_ratios_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    _report().show(Console(width=80))
    output = capsys.readouterr().out
    row = next(line.split() for line in output.splitlines() if line.split()[0] == "mpsl")
    assert row[:6] == ["mpsl", "3000", "2000–5000", "10", "2.00", "2.00–2.00"]
    assert "of the bf16 peak" not in output and "…" not in output


def test_everything_is_written_beside_each_other(tmp_path: Path) -> None:
    report = _report()
    written = report.write(tmp_path / "new" / "bench-toy")
    assert written == [tmp_path / "new" / f"bench-toy.{kind}" for kind in ("json", "png")]
    assert json.loads(written[0].read_text()) == report.figures
    assert written[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name(name: str, tera: float | None) -> None:
    assert peak_of(name) == (None if tera is None else pytest.approx(tera * 1e12))


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--methods", "mpsl,fedavg"], "--methods: expected some of mpsl, psl, centralized"),
        (["--methods", "mpsl,mpsl"], "--methods: name each once"),
        (["--out", "toy.yaml"], "--out: toy.yaml is no folder"),
        (["data.place=own"], "data.place: own"),
        (["--out", "full"], "full/bench-toy.png exists"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_process_starts(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("processes were started"))
    Path("toy.yaml").write_text(yaml.safe_dump(to_dict(toys.experiment())))
    Path("full").mkdir()
    Path("full/bench-toy.png").touch()
    assert main(["bench", "toy.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) == 1
