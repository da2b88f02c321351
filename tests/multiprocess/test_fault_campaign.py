"""Every fault at every phase of a real run: what survives equals a run of one process."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toys
import yaml
from conftest import Launch
from faulty_command import Fault, read
from torch.testing import assert_close

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.runtime.placement import place

COMMAND = str(Path(__file__).with_name("faulty_command.py"))
STEPS, STEPS_PER_EPOCH, MEET_EVERY = 60, 5, 7
WORKERS = [[1, 2], [0, 5], [3, 4]]
#: Phase -> what the server asks then, and how the log names it at a step.
PHASES = {
    "tokenize": ("tokenize", "tokenize, step {at}"),
    "loss": ("loss", "loss, step {at}"),
    "backward": ("backward", "backward, step {at}"),
    "owners' step": ("step", "step, step {at}"),
    "sync": ("tokenizer_weights", "tokenizer_weights, step {at}"),
    "sync of gradients": ("take_gradients", "take_gradients, step {at}"),
    "evaluation": ("tokenize_test", "tokenize_test, evaluation, step {done}"),
    "checkpoint": ("save", "save, checkpoint, step {done}"),
}
WORDS = dict(PHASES.values())


def worded(words: str, at: int) -> str:
    """How the log names a phase at a step, or after it."""
    return words.format(at=at, done=at + 1)


#: Nobody's parameters have moved yet: the step is repeated.
BEFORE = ("tokenize", "loss", "backward")
#: The tokenizers of this step have met.
AFTER = ("tokenize_test", "save")


def experiment(
    mode: str = "weights", replicas: int = 1, shard: bool = False, **faults: Any
) -> Experiment:
    """Six clients on three workers, 60 steps; tests and checkpoints after every fifth."""
    data = {"name": "toy-image+text", "partition": {"alpha": 5.0, "minimum": 8}}
    training = to_dict(toys.experiment())["training"] | {
        "precision": "float64",
        "epochs": STEPS // STEPS_PER_EPOCH,
    }
    return toys.experiment(
        clients=6,
        clients_per_worker=2,
        data=data | {"test_at": "clients"},
        training=training,
        tokenizer_sync={"mode": mode, "every": MEET_EVERY},
        checkpoint={"every_epochs": 1},
        server={"replicas": replicas, "shard": shard},
        faults={
            "client_timeout": 8.0,
            "exit_timeout": 15.0,
            "on_nonfinite": "skip_client",
            "rejoin": "never",
        }
        | faults,
    )


@pytest.fixture
def run(launch: Launch, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Train with these faults to the end; gives exit status and output. No process is left."""

    def train(chosen: Experiment, *faults: str) -> tuple[int, str]:
        config, struck = tmp_path / "toy.yaml", tmp_path / "struck"
        config.write_text(yaml.safe_dump(to_dict(chosen)))
        struck.mkdir()
        known = {"MPSL_TEST_FAULTS": "\n".join(faults), "MPSL_TEST_STRUCK": str(struck)}
        world = launch([sys.executable, COMMAND, "train", str(config)], **known)
        found = world.finish(300)
        assert {path.name for path in struck.iterdir()} == set(faults), found[1]
        return found

    return train


def mates(fault: Fault) -> list[int]:
    """Clients that a fault costs: a worker's clients answer together, but fail alone."""
    if fault.kind == "nan":
        return []
    if fault.kind == "exception":
        return [fault.client]
    return next(clients for clients in WORKERS if fault.client in clients)


@dataclass
class Story:
    """Who is where, after these faults, in the order of their steps."""

    faults: list[Fault]

    @property
    def lost(self) -> dict[int, Fault]:
        """What every lost client was lost to."""
        found: dict[int, Fault] = {}
        for fault in self.faults:
            found = dict.fromkeys(mates(fault), fault) | found
        return found

    def gone(self, client: int, step: int, there_at: tuple[str, ...]) -> bool:
        """Whether a client is lost, or is lost at this step in another message than these."""
        to = self.lost.get(client)
        return to is not None and step >= to.step + (to.message in there_at)

    def skips(self, client: int, step: int) -> bool:
        """Whether a client's numbers keep it out of a step."""
        return any(
            f.client == client
            and (
                (f.message in BEFORE and step == f.step)
                or (f.message in AFTER and f.step < step <= next_meeting(f.step))
            )
            for f in self.spoiled
        )

    @property
    def spoiled(self) -> list[Fault]:
        return [f for f in self.faults if f.kind == "nan"]

    @property
    def repeated(self) -> int:
        skipped = sum(self.skips(n, step) for n in range(6) for step in range(STEPS))
        return skipped + sum(f.message in BEFORE and f.kind != "nan" for f in self.faults)

    def absent(self, client: int, step: int) -> bool:
        later = tuple(message for message in WORDS if message not in BEFORE)
        return self.gone(client, step, later) or self.skips(client, step)

    def stuck(self, client: int, step: int) -> bool:
        return any((f.client, f.message, f.step) == (client, "step", step) for f in self.spoiled)

    def missing(self, client: int, step: int) -> bool:
        spoiled = any(
            f.client == client
            and step == (next_meeting(f.step) if f.message in AFTER else f.step)
            and f.message not in (*BEFORE, "step")
            for f in self.spoiled
        )
        return spoiled or self.gone(client, step, AFTER)


def next_meeting(step: int) -> int:
    return next(s for s in range(step + 1, STEPS) if (s + 1) % MEET_EVERY == 0)


def metrics(folder: Path, split: str) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["split"] == split]


def assert_same(folder: Path, expected: dict[str, Any], left: set[int]) -> None:
    """The run's losses, and what its last checkpoint holds of the server and these clients."""
    losses = [line["loss"] for line in metrics(folder, "train")]
    assert losses == pytest.approx(expected["losses"], rel=0, abs=1e-9)
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    ours = torch.load(last / "server.pt")["model"]
    for key, value in expected["server"].items():
        assert_close(ours[key], value, rtol=0, atol=1e-9)
    assert {int(path.stem[-4:]) for path in last.glob("client-*.pt")} == left
    for n in left:
        own = torch.load(last / f"client-{n:04d}.pt")["tokenizers"]
        for key, value in expected["clients"][n].items():
            assert_close(own[key], value, rtol=0, atol=1e-9, msg=lambda m, n=n: f"client {n}: {m}")


def assert_every_loss_is_told_once(folder: Path, story: Story) -> None:
    log = (folder / "rank0.log").read_text()
    told = re.findall(r"client (\d) is lost: (.*)", log)
    assert sorted(int(client) for client, _ in told) == sorted(story.lost), told
    for client, reason in told:
        fault = story.lost[int(client)]
        assert worded(WORDS[fault.message], fault.step) in reason, reason


def assert_as_told(folder: Path, chosen: Experiment, faults: list[Fault]) -> None:
    story = Story(faults)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps_completed"]) == ("completed", STEPS)
    assert_every_loss_is_told_once(folder, story)
    assert summary["clients_lost"] == len(story.lost)
    assert summary["steps_repeated"] == story.repeated
    for line in metrics(folder, "test"):
        assert 0 <= line["metric"]["accuracy"] <= 1
    expected = reference.train(
        chosen, STEPS, story.absent, stuck=story.stuck, missing=story.missing
    )
    assert_same(folder, expected, set(range(6)) - set(story.lost))


def test_the_clients_lie_where_these_tests_have_them() -> None:
    chosen = experiment()
    assert place(Holdings.load(chosen).sizes, 3) == WORKERS


#: Steps at which faults strike, by what is asked then.
TIMES = {
    "tokenizer_weights": (13, 20, 34, 48),
    "take_gradients": (13, 20, 34, 48),
    "tokenize_test": (9, 19, 29, 44),
    "save": (9, 19, 29, 44),
}


def several(message: str) -> dict[str, list[str]]:
    """Two runs that meet every kind of fault at a message, as far as a run survives it."""
    kinds = {"nan": 3, "exception": 1, "kill": 0, "slow": 2}
    if message == "backward":  # a failure that is over when it is looked for costs nobody
        kinds = {"nan": 3, "kill": 0}
    times = TIMES.get(message, (10, 22, 31, 45))
    first = [f"{k} {n} {message} {at}" for (k, n), at in zip(kinds.items(), times, strict=False)]
    return {"one after the other": first, "stop": [f"stop 5 {message} {times[0]}"]}


CAMPAIGN = [
    pytest.param(phase, which, marks=pytest.mark.campaign, id=f"{phase}-{which}")
    for phase in PHASES
    for which in ("one after the other", "stop")
]


@pytest.mark.parametrize(("phase", "which"), CAMPAIGN)
def test_a_run_survives_every_fault_at_every_phase(
    phase: str, which: str, run: Callable, tmp_path: Path
) -> None:
    faults = several(PHASES[phase][0])[which]
    chosen = experiment("gradients" if phase == "sync of gradients" else "weights")
    status, output = run(chosen, *faults)
    assert status == 0, output
    assert_as_told(tmp_path / "runs" / "toy", chosen, read("\n".join(faults)))


def test_a_run_survives_three_faults(run: Callable, tmp_path: Path) -> None:
    faults = ["exception 1 tokenizer_weights 13", "kill 0 backward 22", "stop 2 tokenize 31"]
    chosen = experiment()
    status, output = run(chosen, *faults)
    assert status == 0, output
    assert_as_told(tmp_path / "runs" / "toy", chosen, read("\n".join(faults)))


@pytest.mark.campaign
@pytest.mark.parametrize("shard", [False, True])
def test_a_group_of_replicas_survives_lost_clients(
    shard: bool, run: Callable, tmp_path: Path
) -> None:
    faults = ["exception 1 tokenize 5", "kill 0 backward 12", "nan 4 backward 21", "kill 3 loss 31"]
    chosen = experiment(replicas=2, shard=shard)
    status, output = run(chosen, *faults)
    assert status == 0 and re.search(r"^replica1 on \S+, cpu$", output, re.MULTILINE), output
    assert_as_told(tmp_path / "runs" / "toy", chosen, read("\n".join(faults)))


def errors(output: str) -> list[str]:
    assert "Traceback" not in output, output
    return re.findall(r"^error: (.*)$", output, re.MULTILINE)


#: How a run tells what ended it, where a worker is lost with its clients and where one fails.
LOST, FAILED = (
    r"worker1 \(clients 1-2\): lost in {}(: .*)?",
    r"worker1, {}: client 2: OSError: clip.*",
)
KINDS = ("exception", "kill", "stop", "slow")


@pytest.mark.parametrize(
    "kind", [k if k == "kill" else pytest.param(k, marks=pytest.mark.campaign) for k in KINDS]
)
def test_a_loss_at_set_up_ends_the_run_by_one_message(kind: str, run: Callable) -> None:
    chosen = experiment()
    chosen = replace(chosen, runtime=replace(chosen.runtime, start_timeout=60.0))
    status, output = run(chosen, f"{kind} 2 describe -1")
    (error,) = errors(output)
    failed = r"worker1 \(clients 1-2\): set-up: OSError: clip.*"
    said = failed if kind == "exception" else LOST.format("set-up")
    assert status == 1 and re.fullmatch(said, error), output


@pytest.mark.campaign
def test_a_client_whose_memory_is_spoiled_at_set_up_takes_part_once_it_is_given_an_average(
    run: Callable, tmp_path: Path
) -> None:
    """The first test finds its tokenizers to be no numbers; so does the first meeting."""
    chosen = experiment()
    status, output = run(chosen, "nan 2 describe -1")
    assert status == 0, output
    folder, first = tmp_path / "runs" / "toy", MEET_EVERY - 1
    expected = reference.train(
        chosen,
        STEPS,
        absent=lambda n, step: n == 2 and step <= first,
        missing=lambda n, step: (n, step) == (2, first),
    )
    assert_same(folder, expected, set(range(6)))
    assert json.loads((folder / "summary.json").read_text())["steps_repeated"] == MEET_EVERY


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["exception", "slow"])
def test_a_backward_that_fails_once_while_every_process_answers_is_repeated(
    kind: str, run: Callable, tmp_path: Path
) -> None:
    chosen, folder = experiment(), tmp_path / "runs" / "toy"
    status, output = run(chosen, f"{kind} 2 backward 10")
    assert status == 0 and "warning: backward failed: " in output, output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["clients_lost"], summary["steps_repeated"]) == (0, 1)
    assert_same(folder, reference.train(chosen, STEPS), set(range(6)))


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kind", "phase"),
    [
        (kind, phase)
        for phase in PHASES
        for kind in KINDS
        if phase != "sync of gradients"
        and (kind, phase) not in (("exception", "backward"), ("slow", "backward"))
    ],
)
def test_where_it_is_told_to_a_run_stops_at_every_phase_by_one_message(
    kind: str, phase: str, run: Callable, tmp_path: Path
) -> None:
    message, words = PHASES[phase]
    at = TIMES.get(message, (10,))[0]
    status, output = run(experiment(on_loss="stop"), f"{kind} 2 {message} {at}")
    (error,) = errors(output)
    said = (FAILED if kind == "exception" else LOST).format(re.escape(worded(words, at)))
    assert status == 1 and re.fullmatch(said, error), output
    summary = json.loads((tmp_path / "runs" / "toy" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["clients_lost"] >= 1


@pytest.mark.campaign
@pytest.mark.parametrize(
    "phase", [phase for phase in PHASES if phase not in ("evaluation", "checkpoint")]
)
def test_numbers_that_are_not_finite_stop_a_run_that_was_not_told_to_skip_them(
    phase: str, run: Callable, tmp_path: Path
) -> None:
    message, _ = PHASES[phase]
    at = TIMES.get(message, (10,))[0]
    mode = "gradients" if phase == "sync of gradients" else "weights"
    status, output = run(experiment(mode, on_nonfinite="stop"), f"nan 2 {message} {at}")
    (error,) = errors(output)
    assert status == 1 and f"step {at}" in error and re.search(r"client 2\b", error), output
