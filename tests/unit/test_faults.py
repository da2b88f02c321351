"""Clients that are lost at every message of a step: what survives equals the reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import toys
from local_fleet import LocalRounds, in_one_process, steps_of

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import BackwardError, DivergedError, NonFiniteError, RemoteError
from mpsl_dist.methods import link, loop
from mpsl_dist.methods.fedavg import FedAvg, build_clients
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.models.average import trainable_state
from mpsl_dist.records import checkpoint, state
from mpsl_dist.records.checkpoint import Manifest
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.answers import Answers, Lost

STEPS, AT, GONE = 12, 4, 2


def experiment(**changes: Any) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64", "epochs": 4}
    faults = {"on_loss": "continue"} | changes.pop("faults", {})
    return toys.experiment(training=training, faults=faults, **changes)


class Dying:
    """Stands before a client; fails at a message of a step, and at every one after that."""

    def __init__(self, client: Any, message: str, step: int) -> None:
        self.client, self.message, self.at = client, message, step
        self.number, self.step_now, self.dead = client.number, -1, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*words: Any) -> Any:
            self.step_now += name == "tokenize"
            self.dead = self.dead or (name == self.message and self.step_now >= self.at)
            if self.dead:
                raise ConnectionError("gone")
            return getattr(self.client, name)(*words)

        return ask


def dying(chosen: Experiment, message: str, client: int = GONE, step: int = AT) -> Mpsl:
    method = in_one_process(chosen)
    clients = method.clients.fleet.host.clients
    clients[client] = Dying(clients[client], message, step)
    return method


def train(method: Mpsl, steps: int = STEPS) -> list[float | None]:
    return steps_of(method, steps)


def assert_survivors_equal(method: Mpsl, expected: dict[str, Any], losses: list) -> None:
    assert losses == pytest.approx(expected["losses"], rel=1e-9)
    for key, value in expected["server"].items():
        torch.testing.assert_close(method.server.model.state_dict()[key], value, rtol=0, atol=1e-9)
    for number in method.clients.present:
        own = method.clients.references[number].tokenizer_weights()
        for key, value in expected["clients"][number].items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("message", ["tokenize", "loss"])
def test_a_step_that_loses_a_client_is_repeated_without_it(
    message: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = experiment()
    method = dying(chosen, message)
    with caplog.at_level(logging.WARNING, logger="mpsl_dist"):
        losses = train(method)
    expected = reference.train(chosen, STEPS, absent=lambda n, step: n == GONE and step >= AT)
    assert_survivors_equal(method, expected, losses)
    assert (method.clients.lost, method.repeated) == ({GONE}, 1)
    told = [r.getMessage() for r in caplog.records if "is lost" in r.getMessage()]
    assert len(told) == 1 and f"{message}, step {AT}" in told[0], told


def test_a_client_lost_after_the_backward_costs_its_own_state_alone() -> None:
    chosen = experiment()
    method = dying(chosen, "step")
    losses = train(method)
    # It took part in its last step: only its own optimizer did not move.
    expected = reference.train(chosen, STEPS, absent=lambda n, step: n == GONE and step > AT)
    assert_survivors_equal(method, expected, losses)
    assert (method.clients.lost, method.repeated) == ({GONE}, 0)


@pytest.mark.parametrize("mode", ["gradients", "weights"])
@pytest.mark.parametrize(
    "message", ["tokenize", "loss", "accumulate", "take_gradients", "step", "tokenizer_weights"]
)
def test_tokenizers_of_the_others_still_meet(mode: str, message: str) -> None:
    method = dying(experiment(tokenizer_sync={"mode": mode, "every": 3}), message)
    train(method)
    one, *others = [method.clients.references[n].tokenizer_weights() for n in (0, 1, 3)]
    for key, value in one.items():
        assert all(torch.equal(value, other[key]) for other in others), key
    assert method.clients.lost <= {GONE}


@pytest.mark.parametrize("place", ["server", "clients"])
@pytest.mark.parametrize("message", ["tokenizer_weights", "begin_test", "tokenize_test", "score"])
def test_a_test_goes_on_without_a_lost_client(place: str, message: str) -> None:
    data = {"name": "toy-image+text", "partition": {"alpha": 0.5, "minimum": 3}, "test_at": place}
    method = dying(experiment(data=data), message, client=0, step=-1)
    method.begin_epoch(0)
    assert 0 <= method.evaluate()["accuracy"] <= 1
    assert method.deployable() is not None
    train(method, 2)


def test_a_client_lost_at_an_epochs_begin_or_a_checkpoint_is_left_out(tmp_path) -> None:
    method = dying(experiment(), "begin_epoch", step=-1)
    train(method, 3)
    assert method.clients.lost == {GONE}
    method = dying(experiment(), "save", step=-1)
    train(method, 3)
    method.save(str(tmp_path))
    assert method.clients.lost == {GONE} and len(list(tmp_path.glob("client-*.pt"))) == 3


def test_by_default_a_step_with_one_client_left_still_trains_and_with_none_the_run_stops() -> None:
    method = in_one_process(experiment())
    clients = method.clients.fleet.host.clients
    for n in (0, 1, 3):
        clients[n] = Dying(clients[n], "tokenize", 2)
    assert all(loss is not None for loss in train(method, 4))
    clients[2] = Dying(clients[2], "tokenize", 0)
    with pytest.raises(RemoteError, match="0 clients are left, faults.min_clients is 1"):
        method.step(0, 4)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"on_loss": "stop"}, "client 2: ConnectionError"),
        ({"min_clients": 4}, "3 clients are left"),
    ],
)
def test_it_stops_where_it_was_told_to(faults: dict, words: str) -> None:
    method = dying(experiment(faults=faults), "loss")
    before: dict[str, torch.Tensor] = {}
    with pytest.raises(RemoteError, match=words) as error:
        for step in range(STEPS):
            before = trainable_state(method.server.model)
            if step % len(method.plan) == 0:
                method.begin_epoch(step // len(method.plan))
            method.step(step % len(method.plan), step)
    assert error.value.lost == (GONE,) and type(error.value) is RemoteError
    after = trainable_state(method.server.model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def poisoned(chosen: Experiment, what: str) -> Mpsl:
    """Client 2 has a loss, or a gradient, that is no number in step 4."""
    method = in_one_process(chosen)
    client = method.clients.references[GONE]
    loss, steps = client.loss, iter(range(1000))

    def bad(epoch_step: int, predictions: torch.Tensor) -> torch.Tensor:
        good = loss(epoch_step, predictions)
        if next(steps) != AT:
            return good
        # The square root's slope at zero is infinite: a finite loss, no finite gradient.
        return (
            good * float("nan") if what == "loss" else good + (predictions * 0).abs().sqrt().sum()
        )

    client.loss = bad
    return method


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_the_run_or_skips_the_client(what: str) -> None:
    with pytest.raises(NonFiniteError, match=rf"step {AT}: the {what} of client {GONE} is nan"):
        train(poisoned(experiment(), what))
    chosen = experiment(faults={"on_nonfinite": "skip_client"})
    method = poisoned(chosen, what)
    losses = train(method)
    expected = reference.train(chosen, STEPS, absent=lambda n, step: (n, step) == (GONE, AT))
    assert_survivors_equal(method, expected, losses)
    assert (method.clients.lost, method.repeated) == (set(), 1)


#: Whose numbers are spoiled at a message, as the user reads it.
SENT = {
    "step": ("none", "client 2: DivergedError: a gradient of its tokenizers is no finite number"),
    "tokenizer_weights": ("weights", "the tokenizers of client 2 hold numbers that are not finite"),
    "take_gradients": ("gradients", "the gradients of client 2 hold numbers that are not finite"),
}


def spoiling(chosen: Experiment, message: str) -> Mpsl:
    """Client 2's own numbers are none at its second such message."""
    method = in_one_process(chosen)
    client = method.clients.references[GONE]
    answer, calls = getattr(client, message), iter(range(1000))

    def bad(*words: Any) -> Any:
        if next(calls) != 1:
            return answer(*words)
        if message == "step":
            return answer(words[0], {p: g * float("nan") for p, g in words[1].items()})
        found = answer(*words)
        if message == "take_gradients":
            return found * float("nan")
        return {key: x * float("nan") for key, x in found.items()}

    setattr(client, message, bad)
    return method


@pytest.mark.parametrize("message", SENT)
def test_numbers_that_would_spoil_the_tokenizers_stop_the_run_or_are_left_out_once(
    message: str, caplog: pytest.LogCaptureFixture
) -> None:
    mode, words = SENT[message]
    sync = {"mode": mode, "every": 3}
    with pytest.raises(DivergedError, match=words):
        train(spoiling(experiment(tokenizer_sync=sync), message))
    chosen = experiment(tokenizer_sync=sync, faults={"on_nonfinite": "skip_client"})
    method = spoiling(chosen, message)
    with caplog.at_level(logging.WARNING, logger="mpsl_dist"):
        losses = train(method)
    assert [r.getMessage() for r in caplog.records if words in r.getMessage()]
    at = 1 if message == "step" else 5  # the tokenizers meet after steps 2 and 5

    def then(client: int, step: int) -> bool:
        return (client, step) == (GONE, at)

    rule = {"stuck" if message == "step" else "missing": then}
    assert_survivors_equal(method, reference.train(chosen, STEPS, **rule), losses)
    assert (method.clients.lost, method.repeated) == (set(), 0)


def test_a_run_whose_tokenizers_are_all_no_numbers_is_at_its_end() -> None:
    method = in_one_process(experiment(faults={"on_nonfinite": "skip_client"}))
    for client in method.clients.references.values():
        with torch.no_grad():
            client.parameters()[0].fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"the tokenizers of clients 0-3 hold numbers"):
        method.evaluate()


@pytest.mark.parametrize("after", ["step", "accumulate", "take_gradients"])
def test_a_loss_after_the_backward_ends_a_run_of_too_few_and_never_repeats_the_step(
    after: str,
) -> None:
    mode = "none" if after == "step" else "gradients"
    sync = {"mode": mode, "every": 2}
    method = dying(experiment(faults={"min_clients": 4}, tokenizer_sync=sync), after)
    with pytest.raises(
        RemoteError, match=r"3 clients are left, faults\.min_clients is 4\)$"
    ) as error:
        train(method)
    assert method.repeated == 0 and type(error.value) is RemoteError


def test_the_steps_repeated_go_on_counting_where_a_run_resumes(tmp_path) -> None:
    first = dying(experiment(), "loss")
    train(first)
    run = RunDirectory(tmp_path)
    for step in range(STEPS):
        line = {"step": step + 1, "epoch": 0, "split": "train", "loss": 1.0, "seconds": 1.0}
        run.append_metrics(**line, steps_repeated=int(step >= AT))
    folder = checkpoint.begin(run.checkpoints, STEPS)
    files, steps = first.save(str(folder)), len(first.plan)
    manifest = Manifest(STEPS, *divmod(STEPS, steps), 4, 1.0, {}, files)
    checkpoint.complete(run.checkpoints, manifest, keep=1)
    again = in_one_process(experiment())
    assert loop._resume(again.experiment, again, run).step == STEPS
    assert (again.repeated, again.clients.lost) == (1, set())


# -- FedAvg ------------------------------------------------------------------------------------


def rounds(**faults: Any) -> FedAvg:
    chosen = experiment(method="fedavg", faults=faults)
    holdings = Holdings.load(chosen)
    link = LocalRounds(build_clients(chosen, range(4), holdings), chosen.faults)
    return FedAvg(chosen, holdings.splits, deployable.build(chosen, holdings.splits), link)


def train_rounds(method: FedAvg, count: int = 3) -> list[float | None]:
    return [method.step(0, round_) for round_ in range(count)]


def test_a_federated_round_goes_on_without_a_lost_client() -> None:
    method, others = rounds(), rounds()
    clients = method.clients.fleet.host.clients
    clients[GONE] = Dying(clients[GONE], "train_round", -1)
    # The same where it was never there.
    others.clients.lost.add(GONE)
    assert train_rounds(method) == train_rounds(others)
    assert method.clients.lost == {GONE}
    ours, theirs = trainable_state(method.model), trainable_state(others.model)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def diverging(method: FedAvg, round_: int) -> FedAvg:
    client = method.clients.references[GONE]
    train = client.train_round

    def fail(number: int, weights: Any) -> Any:
        if number == round_:
            raise DivergedError("the loss is nan. Lower training.server.lr")
        return train(number, weights)

    client.train_round = fail
    return method


def test_a_federated_client_that_diverges_ends_the_run_with_advice_or_is_left_out_once() -> None:
    with pytest.raises(DivergedError, match=rf"client {GONE}: .*Lower training\.server\.lr"):
        train_rounds(diverging(rounds(), 1))
    method = diverging(rounds(on_nonfinite="skip_client"), 1)
    assert None not in train_rounds(method) and method.clients.lost == set()
    assert method.clients.calls[-1] == ("train_round", [0, 1, 2, 3])


class Failing:
    """A fleet's backward, which fails while all clients answer."""

    def __init__(self, method: Mpsl, culprits: set[int], times: int = 100) -> None:
        self.opened, self.culprits, self.times = method.clients.fleet.autograd, culprits, times
        self.asked: list[list[int]] = []
        method.clients.fleet.autograd = self.autograd

    @contextmanager
    def autograd(self, clients: Any) -> Any:
        self.asked.append(list(clients))
        with self.opened(clients) as opened:
            if self.culprits & set(clients) and self.times:
                self.times -= 1
                opened.backward = self.fail
            yield opened

    def fail(self, loss: torch.Tensor, where: str) -> None:
        raise BackwardError(f"backward failed: out of memory, {where}")


def test_a_client_whose_backward_fails_is_found_and_lost(capsys) -> None:
    """Nothing in the error tells whose it was: each is tried alone, and nothing moves meanwhile."""
    chosen = experiment()
    method = in_one_process(chosen)
    method.begin_epoch(0)
    losses = [method.step(0, 0)]
    failing = Failing(method, {GONE})
    losses += [method.step(n, n) for n in range(1, 4)]
    expected = reference.train(chosen, 4, absent=lambda n, step: n == GONE and step >= 1)
    assert_survivors_equal(method, expected, losses)
    method.clients.fleet.awake = {GONE}
    assert method.clients.readmit("step 4").clients == [], "it would only fail again"
    together, *alone = failing.asked
    assert alone[: len(together)] == [[client] for client in together]
    assert (method.clients.lost, method.repeated) == ({GONE}, 1)
    assert f"client {GONE} is lost: client {GONE}: backward failed" in capsys.readouterr().err


def test_a_backward_that_fails_once_is_repeated_and_twice_ends_the_run() -> None:
    chosen = experiment()
    method = in_one_process(chosen)
    method.begin_epoch(0)
    Failing(method, {GONE}, times=1)
    losses = [method.step(n, n) for n in range(4)]
    assert_survivors_equal(method, reference.train(chosen, 4), losses)
    assert (method.clients.lost, method.repeated) == (set(), 1)
    failing = Failing(method, {0, GONE})
    opened = failing.autograd
    method.clients.fleet.autograd = lambda clients: (
        opened(clients) if len(clients) > 1 else failing.opened(clients)
    )
    with pytest.raises(BackwardError, match="out of memory, step 3"):
        method.step(3, 3)


def test_where_no_client_may_be_lost_a_backward_that_fails_ends_the_run_by_its_name() -> None:
    method = in_one_process(experiment(faults={"on_loss": "stop"}))
    method.begin_epoch(0)
    Failing(method, {GONE})
    with pytest.raises(RemoteError, match=f"client {GONE}: backward failed") as error:
        method.step(0, 0)
    assert error.value.lost == (GONE,)


def test_a_step_in_which_nobodys_numbers_are_finite_ends_the_run() -> None:
    method = in_one_process(experiment(faults={"on_nonfinite": "skip_client"}))
    for client in method.clients.references.values():
        for parameter in client.parameters():
            parameter.data.fill_(float("nan"))
    method.begin_epoch(0)
    with pytest.raises(NonFiniteError):
        method.step(0, 0)


# -- clients that come back ------------------------------------------------------------------------

BACK = 8


def train_with_a_return(method: Mpsl, keep: Path | None = None, every: int = 2) -> list:
    """As the loop: the lost client's worker comes back before step ``BACK``."""
    losses = []
    for step in range(STEPS):
        epoch, epoch_step = divmod(step, len(method.plan))
        if step == BACK:
            method.clients.fleet.back = [GONE]
        back = method.clients.readmit(f"step {step}")
        if back.clients:
            assert back.clients == [GONE]
            method.welcome(back)
        if back.clients or epoch_step == 0:
            method.begin_epoch(epoch, epoch_step)
        losses.append(method.step(epoch_step, step))
        if keep and (step + 1) % every == 0:
            method.clients.keep(str(keep), f"step {step}")
    return losses


@pytest.mark.parametrize("head_at", ["server", "client"])
@pytest.mark.parametrize("keeps", [False, True], ids=["the others' average", "its own state"])
def test_a_client_that_comes_back_goes_on_from(keeps: bool, head_at: str, tmp_path: Path) -> None:
    chosen = experiment(model={"head_at": head_at})
    method = dying(chosen, "loss")
    losses = train_with_a_return(method, tmp_path if keeps else None)
    sizes, kept = list(method.sizes.values()), {}

    def before(step: int, clients: list, optimizers: list) -> None:
        """Client ``GONE`` kept its state last after step 3, before it was lost in step 4."""
        if keeps and step == AT:
            kept["optimizer"] = copy.deepcopy(optimizers[GONE].state_dict())
            kept["tokenizers"] = copy.deepcopy(clients[GONE].state_dict())
        if step == BACK and keeps:
            clients[GONE].load_state_dict(kept["tokenizers"])
            optimizers[GONE].load_state_dict(kept["optimizer"])
        elif step == BACK:
            others = [n for n in range(len(clients)) if n != GONE]
            total = sum(sizes[n] for n in others)
            for parts in zip(*[c.parameters() for c in clients], strict=True):
                mean = sum(parts[n].data * sizes[n] / total for n in others)
                parts[GONE].data.copy_(mean)
            optimizers[GONE].state.clear()

    away = range(AT, BACK)
    expected = reference.train(chosen, STEPS, lambda n, step: n == GONE and step in away, before)
    assert_survivors_equal(method, expected, losses)
    assert method.clients.present == [0, 1, 2, 3]
    assert (method.clients.lost, method.clients.returned) == (set(), 1)


def slow(method: Mpsl) -> None:
    """Client ``GONE`` gives no answer in step ``AT``; what it was asked it does all the same."""
    start, number = method.clients.fleet.start, f"step {AT}"

    def silent(message: str, arguments: Any, where: str = "", autograd: Any = None) -> Any:
        wait = start(message, arguments, where, autograd)
        if GONE not in arguments or where != number:
            return wait
        others = {n: answer for n, answer in wait().by_client.items() if n != GONE}
        return lambda: Answers(others, {GONE: Lost(f"lost in {message}, {where}")})

    method.clients.fleet.start = silent


def test_a_client_that_was_slow_goes_on_with_the_state_that_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "_ASK_AGAIN", 0.0)
    chosen = experiment()
    method = in_one_process(chosen)
    slow(method)
    losses = []
    for step in range(STEPS):
        if step == BACK:
            method.clients.fleet.awake = {GONE}
        back = method.clients.readmit(f"step {step}")
        assert (back.fresh, back.awake) == ([], [GONE] if step == BACK else [])
        if back.clients:
            method.welcome(back)
        epoch, epoch_step = divmod(step, len(method.plan))
        if back.clients or epoch_step == 0:
            method.begin_epoch(epoch, epoch_step)
        losses.append(method.step(epoch_step, step))
    away = range(AT, BACK)
    expected = reference.train(chosen, STEPS, lambda n, step: n == GONE and step in away)
    assert_survivors_equal(method, expected, losses)
    assert (method.clients.lost, method.clients.returned) == (set(), 1)


def test_nobody_comes_back_where_nobody_is_to() -> None:
    method = in_one_process(experiment(faults={"rejoin": "never"}))
    slow(method)
    train(method, AT + 1)
    fleet = method.clients.fleet
    fleet.awake, fleet.back = {GONE}, [GONE]
    assert method.clients.readmit("step 5").clients == []
    assert method.clients.lost == {GONE}


@pytest.mark.parametrize(("every", "head_at"), [(1, "server"), (3, "server"), (3, "client")])
def test_where_all_tokenizers_are_the_same_they_are_after_a_return(
    every: int, head_at: str
) -> None:
    """Optimizer and all: they step on the same sums ever after."""
    rule = {"mode": "gradients", "every": every}
    method = dying(experiment(tokenizer_sync=rule, model={"head_at": head_at}), "tokenize")
    train_with_a_return(method)
    assert method.clients.returned == 1
    one, *others = [method.clients.references[n].hand_over() for n in range(4)]
    assert ("head.weight" in one["tokenizers"]) == (head_at == "client")
    for other in others:
        for key, value in one["tokenizers"].items():
            assert torch.equal(value, other["tokenizers"][key]), key
        assert all(one["moments"].values())
        for name, values in one["moments"].items():
            for key, value in values.items():
                assert torch.equal(value, other["moments"][name][key]), (name, key)


def test_a_state_that_was_damaged_while_the_client_was_away_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = dying(experiment(), "loss", step=1)
    method.begin_epoch(0)
    method.clients.keep(str(tmp_path), "step 0")
    for step in range(3):
        method.step(step, step)
    (tmp_path / state.client_file(GONE)).write_bytes(b"damaged")
    method.clients.fleet.back = [GONE]
    with caplog.at_level(logging.WARNING, logger="mpsl_dist"):
        method.welcome(method.clients.readmit("step 3"))
    assert f"client {GONE} comes back without its own state" in caplog.text
    one = method.clients.references[GONE].tokenizer_weights()
    first = in_one_process(experiment()).clients.references[GONE].tokenizer_weights()
    assert not all(torch.equal(one[key], first[key]) for key in one), "it is as at the start"


def test_a_client_lost_again_on_its_way_back_is_lost() -> None:
    method = dying(experiment(), "loss")
    train(method, AT + 1)
    rebuild = method.clients.fleet.rebuild

    def worse(numbers: list[int]) -> list:
        return [Dying(client, "set_tokenizer_weights", -1) for client in rebuild(numbers)]

    method.clients.fleet.rebuild, method.clients.fleet.back = worse, [GONE]
    method.welcome(method.clients.readmit("step 5"))
    assert method.clients.lost == {GONE}
    method.begin_epoch(1, 2)
    assert method.step(2, AT + 1) is not None


def test_a_resumed_run_gives_an_absent_client_the_optimizer_too_where_all_are_the_same(
    tmp_path: Path,
) -> None:
    chosen = experiment(tokenizer_sync={"mode": "gradients", "every": 1})
    method = dying(chosen, "tokenize")
    train(method, 6)
    files = method.save(str(tmp_path))
    again = in_one_process(chosen)
    again.restore(str(tmp_path), files)
    again.begin_epoch(2)
    for step in range(3):
        again.step(step, 6 + step)
    one, *others = [again.clients.references[n].tokenizer_weights() for n in range(4)]
    for other in others:
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_a_resumed_run_that_had_lost_nobody_sends_nothing_for_it(mode: str, tmp_path: Path) -> None:
    chosen = experiment(tokenizer_sync={"mode": mode, "every": 1})
    method = in_one_process(chosen)
    train(method, 3)
    again = in_one_process(chosen)
    again.restore(str(tmp_path), method.save(str(tmp_path)))
    assert sum(again.traffic.totals().values()) == 0
