"""Masked sums: of what clients send of their tokenizers the server gets the sum alone."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from local_fleet import LocalSplit, in_one_process, steps_of
from torch import Tensor, nn

from mpsl_dist.actors import deployable, masking
from mpsl_dist.actors.client import Client
from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.actors.learner import Learner
from mpsl_dist.actors.masking import Masked, MaskedSum
from mpsl_dist.actors.references import Local
from mpsl_dist.analysis import flops, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, Faults, to_dict
from mpsl_dist.errors import ConfigError, DivergedError, RemoteError
from mpsl_dist.methods import mpsl
from mpsl_dist.methods.centralized import Centralized
from mpsl_dist.methods.masked import Masks, masked_sum
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models import fixed_point
from mpsl_dist.models.average import average, trainable_state
from mpsl_dist.runtime.answers import Answers, Lost

STEPS, AT = 6, 3
#: All clients give to all steps, so that a sum may lose one of four.
EVEN = {"name": "toy-image+text", "partition": {"kind": "iid"}}
#: Standard deviations of a random figure that no test run will ever see.
SIGMAS = 7.0


def experiment(mode: str = "gradients", every: int = 1, **changes: Any) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64", "epochs": 4}
    training |= changes.pop("training", {})
    sync = {"mode": mode, "every": every, "masked": changes.pop("masked", True)}
    faults = {"min_clients": 3} | changes.pop("faults", {})
    return toys.experiment(training=training, tokenizer_sync=sync, faults=faults, **changes)


def clients_with(gradients: list[Tensor | None]) -> LocalSplit:
    """A link to clients that have kept these gradients, and have no data."""
    clients = []
    for number, vector in enumerate(gradients):
        client = Client(number, None, None, Local(nn.Linear(2, 1)), None, "early", None)
        client._accumulated = None if vector is None else vector.clone()
        clients.append(client)
    link = LocalSplit(clients, Faults(min_clients=3))
    link.masks = Masks({"w": torch.zeros(1, dtype=torch.float64)})
    return link


def add_up(link: LocalSplit) -> tuple[Tensor, list[int]] | None:
    shares = dict.fromkeys(link.present, 1.0)
    return masked_sum(link, link.masks, "gradients", shares, "step 0", "sync_up")


def answers_to(link: Any, message: str) -> list[dict[int, Any]]:
    """What clients answer to every call of a message from now on."""
    kept, start = [], link.fleet.start

    def keeping(name: str, *words: Any, **more: Any) -> Callable[[], Answers]:
        wait = start(name, *words, **more)
        if name == message:
            kept.append(dict(wait().by_client))
        return wait

    link.fleet.start = keeping
    return kept


# -- the sum ---------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.integers(1, 300),
    has=st.lists(st.booleans(), min_size=3, max_size=9),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1500.0]),
    seed=st.integers(0, 2**31),
)
def test_a_masked_sum_is_the_plain_sum_to_rounding(
    numbers: int, has: list[bool], scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(numbers, generator=generator).double() * 2 - 1 for _ in has]
    vectors = [x * scale if there else None for x, there in zip(drawn, has, strict=True)]
    found = add_up(clients_with(vectors))
    members = [n for n, there in enumerate(has) if there]
    if len(members) < 3:
        assert found is None
        return
    total, summed = found
    assert summed == members
    each = 2.0 ** -(fixed_point.PLACES + 1)
    plain = torch.stack([vectors[n] for n in members]).sum(0)
    torch.testing.assert_close(total, plain, rtol=1e-15, atol=each * len(members))


@pytest.mark.parametrize("clients", [3, 10, 1000])
def test_the_largest_numbers_of_all_clients_do_not_wrap(clients: int) -> None:
    most = torch.full((1,), fixed_point.largest(clients), dtype=torch.float64)
    for sign in (1, -1):
        whole = fixed_point.encode(sign * most, clients, "x") * clients
        torch.testing.assert_close(fixed_point.decode(whole), sign * most * clients)
    with pytest.raises(DivergedError, match="numbers up to"):
        fixed_point.encode(most * 1.001, clients, "x")


def test_more_clients_than_are_held_at_once_are_summed() -> None:
    vectors = [torch.full((3,), float(n)) for n in range(70)]
    total, members = add_up(clients_with(vectors))
    assert members == list(range(70)) and total.tolist() == [69 * 35.0] * 3


# -- what a message tells --------------------------------------------------------------------------

LONG = 200_000


def assert_random(vector_n: Tensor, secrets: list[Tensor]) -> None:
    """Uniform bytes (chi-square), and no correlation with any of these."""
    counts = np.bincount(vector_n.numpy().view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < SIGMAS * np.sqrt(2 * 255)
    for secret in secrets:
        r = torch.corrcoef(torch.stack([vector_n.double(), secret.double()]))[0, 1]
        assert abs(r) < SIGMAS / np.sqrt(len(vector_n))


def test_a_masked_message_says_nothing_of_its_gradient_nor_two_rounds_of_each_other() -> None:
    torch.manual_seed(0)
    vectors = [torch.randn(LONG) for _ in range(3)]
    link = clients_with(vectors)
    rounds = answers_to(link, "mask")
    total, _ = add_up(link)
    again, _ = add_up(link)
    assert torch.equal(total, again)
    first, second = ({n: x.vector_n for n, x in sent.items()} for sent in rounds)
    for client, secret in enumerate(vectors):
        assert_random(first[client], [secret])
        assert_random(second[client], [secret])
        assert_random(first[client] - second[client], [secret])
    # All but one together are as random as one, and all are before the lock is off.
    assert_random(first[0] + first[1], vectors)
    assert_random(sum(first.values()), [*vectors, total])


def slow(link: Any, message: str, client: int) -> list[Any]:
    """The first answer of a client to a message comes too late; gives it once it is there."""
    late, start = [], link.fleet.start

    def start_slowly(name: str, asked: Any, where: str = "", autograd: Any = None) -> Any:
        wait = start(name, asked, where, autograd)
        if name != message or client not in asked or late:
            return wait
        answers = dict(wait().by_client)
        late.append(answers.pop(client))
        return lambda: Answers(answers, {client: Lost(f"lost in {name}, {where}")})

    link.fleet.start = start_slowly
    return late


@pytest.mark.parametrize("client", [0, 2], ids=["the locker", "another"])
def test_a_vector_that_comes_late_stays_locked(client: int) -> None:
    """Or its difference to the sum of the others, which is taken without it, would be bare."""
    torch.manual_seed(0)
    vectors = [torch.randn(LONG) for _ in range(4)]
    link = clients_with(vectors)
    rounds, late = answers_to(link, "mask"), slow(link, "mask", client)
    total, members = add_up(link)
    assert client not in members and link.lost == {client} and len(rounds) == 2
    everyones = sum(sent.vector_n for sent in rounds[0].values())
    assert_random(everyones - torch.round(total * 2.0**fixed_point.PLACES).long(), vectors)
    sealed = next(sent.sealed for sent in rounds[0].values() if sent.sealed is not None)
    answers = link.fleet.start("unlock", {n: (0, sealed[n]) for n in members})()
    assert not answers.by_client
    assert all("begun last" in why.message for why in answers.lost.values())
    assert isinstance(late[0], Masked)


def test_a_client_guards_its_vector() -> None:
    """Against a set of two, a set that it is not in, and a second use of its key."""
    parts = [MaskedSum(n, 5, torch.zeros(4, dtype=torch.long)) for n in range(3)]
    keys = torch.stack([part.key for part in parts])
    with pytest.raises(RuntimeError, match="2 clients, where 3"):
        parts[0].mask((0, 1), keys[:2])
    with pytest.raises(RuntimeError, match="different keys are needed"):
        parts[0].mask((0, 1, 2), keys[[0, 1, 1]])
    with pytest.raises(RuntimeError, match="one of them its own"):
        parts[0].mask((1, 2, 3), keys)
    parts[0].mask((0, 1, 2), keys)
    with pytest.raises(RuntimeError, match="masked a vector before"):
        parts[0].mask((0, 1, 2), keys)
    with pytest.raises(RuntimeError, match="masked sum 4: it is not the one"):
        masking.begun(parts[0], 4)


def test_masks_belong_to_the_number_of_the_sum_and_its_clients() -> None:
    """The same key pairs, as if they were used again: no seed is that of the other sum."""
    parts = [MaskedSum(n, 5, torch.zeros(4, dtype=torch.long)) for n in range(4)]
    public = {part.client: part._public for part in parts}
    whole = parts[0]._agree(public)
    fewer = parts[0]._agree({n: public[n] for n in (0, 1, 2)})
    swapped = parts[0]._agree({0: public[0], 1: public[1], 2: public[2], 7: public[3]})
    parts[0].number = 6
    later = parts[0]._agree(public)
    assert len({found[1][0] for found in (whole, fewer, swapped, later)} | {whole[1][1]}) == 5


# -- training --------------------------------------------------------------------------------------


def assert_like(method: Mpsl, expected: dict[str, Any], losses: list, atol: float = 1e-9) -> None:
    assert losses == pytest.approx(expected["losses"], rel=1e-9)
    for number in method.clients.present:
        own = method.clients.references[number].tokenizer_weights()
        for key, value in expected["clients"][number].items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=atol)


def test_masked_gradients_every_step_are_centralized_training() -> None:
    """As without masks, within 1e-8: a gradient's sum is rounded to 2^-48 = 3.6e-15."""
    chosen = experiment()
    method = in_one_process(chosen)
    losses = steps_of(method, STEPS)
    holdings = Holdings.load(chosen)
    learner = Learner(deployable.build(chosen, holdings.splits), chosen.training)
    assert losses == pytest.approx(steps_of(Centralized(chosen, holdings, learner), STEPS), 1e-8)
    own = dict(learner.model.tokenizers.named_parameters())
    for client in method.clients.references.values():
        for key, value in client.tokenizer_weights().items():
            torch.testing.assert_close(value, own[key].detach(), rtol=0, atol=1e-8)


PLAIN = {"take_gradients", "tokenizer_weights"}


@pytest.mark.parametrize("kind", [Mpsl, Psl])
@pytest.mark.parametrize(("mode", "every"), [("none", 1), ("gradients", 3), ("weights", 2)])
def test_a_masked_run_is_the_plain_one_and_no_client_sends_its_own(
    mode: str, every: int, kind: type[Mpsl]
) -> None:
    masked = in_one_process(experiment(mode, every), kind)
    plain = in_one_process(experiment(mode, every, masked=False), kind)
    assert steps_of(masked, STEPS) == pytest.approx(steps_of(plain, STEPS), 1e-9)
    assert masked.evaluate() == plain.evaluate()
    ours, theirs = (trainable_state(m.deployable().tokenizers) for m in (masked, plain))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-9)
    asked = {message for message, clients in masked.clients.calls if message in PLAIN}
    # Under gradients one client speaks for all: its weights are everybody's.
    assert asked == ({"tokenizer_weights"} if mode == "gradients" else set())


def test_float32_averages_come_back_as_float32() -> None:
    method = in_one_process(experiment("weights", 1, training={"precision": "float32"}))
    steps_of(method, 2)
    one, other, *_ = (c.tokenizer_weights() for c in method.clients.references.values())
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {x.dtype for x in one.values()} == {torch.float32}


def test_own_tokenizers_are_tested_at_their_clients_without_being_sent() -> None:
    data = {"name": "toy-image+text", "partition": {"alpha": 0.5, "minimum": 3}}
    data["test_at"] = "clients"
    results = []
    for masked in (True, False):
        chosen = experiment("none", data=data, masked=masked, training={"evaluate_own": True})
        method = in_one_process(chosen)
        steps_of(method, 3)
        results.append(method.evaluate())
        sent_alone = ("tokenizer_weights", [0, 1, 2, 3]) in method.clients.calls
        assert sent_alone != masked
    assert results[0] == results[1] and "accuracy_own_mean" in results[0]


def test_too_few_gradients_wait_for_the_next_sum(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"client_share": "equal", "clients": 5}
    masked = in_one_process(experiment(**changes))
    alone = {step for step, row in enumerate(masked.plan) if 0 < (row > 0).sum() < 3}
    steps = len(masked.plan) + 2
    assert alone, "some steps are of one or two clients"
    with caplog.at_level(logging.WARNING, logger="mpsl_dist"):
        losses = steps_of(masked, steps)
    told = [r.getMessage() for r in caplog.records if "kept for the next sum" in r.getMessage()]
    plain = in_one_process(experiment(masked=False, **changes))
    waiting = {step for step in range(steps) if f"step {step}: fewer" in " ".join(told)}
    monkeypatch.setattr(mpsl, "is_due", lambda sync, step, steps: step not in waiting)
    assert waiting and waiting <= alone
    assert losses == pytest.approx(steps_of(plain, steps), 1e-9)
    for n, client in masked.clients.references.items():
        other = plain.clients.references[n].tokenizer_weights()
        for key, value in client.tokenizer_weights().items():
            torch.testing.assert_close(value, other[key], rtol=0, atol=1e-9)


# -- losses ----------------------------------------------------------------------------------------


def fail_at(method: Mpsl, client: int, message: str, step: int) -> None:
    """A client that is gone from its answer to a message in a step on."""
    one, gone = method.clients.references[client], []

    def guard(name: str) -> None:
        answer = getattr(one, name)

        def ask(*words: Any) -> Any:
            if gone or (name == message and method.clients.done >= step):
                gone.append(name)
                raise ConnectionError("gone")
            return answer(*words)

        setattr(one, name, ask)

    for name in ("tokenize", "loss", "offer_key", "mask", "unlock", "step_on_sum", "step"):
        guard(name)


def counted_steps(method: Mpsl, steps: int) -> list[float | None]:
    step = method.step

    def counting(epoch_step: int, number: int) -> float | None:
        method.clients.done = number
        return step(epoch_step, number)

    method.step = counting
    return steps_of(method, steps)


@pytest.mark.parametrize(("mode", "every"), [("gradients", 2), ("weights", 1)])
@pytest.mark.parametrize(
    ("message", "client"), [("offer_key", 2), ("mask", 2), ("mask", 0), ("unlock", 0)]
)
def test_a_sum_that_loses_a_client_is_that_of_the_others(
    message: str, client: int, mode: str, every: int
) -> None:
    """Unless its vector had arrived: then it is in the sum, though another opens it."""
    chosen = experiment(mode, every, data=EVEN)
    method = in_one_process(chosen)
    fail_at(method, client, message, AT)
    losses = counted_steps(method, STEPS)
    assert method.clients.lost == {client} and method.repeated == 0
    arrived = message == "unlock"
    expected = reference.train(
        chosen,
        STEPS,
        absent=lambda n, step: n == client and step > AT,
        missing=lambda n, step: n == client and step >= AT + arrived,
    )
    assert_like(method, expected, losses)


def test_a_client_that_comes_back_begins_with_a_masked_average_of_the_others() -> None:
    method = in_one_process(experiment("none"))
    fail_at(method, 2, "tokenize", AT)
    counted_steps(method, AT + 1)
    method.clients.fleet.back = [2]
    method.welcome(method.clients.readmit("step 4"))
    others = {n: method.clients.references[n].tokenizer_weights() for n in (0, 1, 3)}
    mean = average(list(others.values()), [method.sizes[n] for n in others])
    for key, value in method.clients.references[2].tokenizer_weights().items():
        torch.testing.assert_close(value, mean[key], rtol=0, atol=1e-13)
    assert not PLAIN & {message for message, _ in method.clients.calls}


def test_where_fewer_than_three_are_left_the_run_ends_before_anything_is_summed() -> None:
    method = in_one_process(experiment("weights", 1, clients=3))
    fail_at(method, 2, "mask", AT)
    with pytest.raises(RemoteError, match="min_clients is 3"):
        counted_steps(method, STEPS)
    method = in_one_process(experiment("none", clients=3))
    method.clients.lost = {1}
    with pytest.raises(RemoteError, match="evaluation, step 0: fewer than three"):
        method.evaluate()


def test_a_sum_that_nobody_is_left_to_open_ends_the_run_and_says_whose_it_was() -> None:
    """Enough others are left for the run, but they have added nothing."""
    kept = [torch.ones(3, dtype=torch.float64)] * 3 + [None] * 3
    link = clients_with(kept)
    members = [link.fleet.host.clients[n] for n in range(3)]
    for one in members:
        one.unlock = gone
    with pytest.raises(RemoteError, match=r"step 0: clients? 0.*2 are lost.*--resume"):
        add_up(link)
    assert link.present == [3, 4, 5]


def gone(*words: Any) -> Any:
    raise ConnectionError("gone")


@pytest.mark.parametrize("wrong", [float("nan"), 1e9])
def test_what_cannot_be_summed_names_its_client_and_is_left_out_once(wrong: float, caplog) -> None:
    def poisoned(**faults: str) -> Mpsl:
        method = in_one_process(experiment(faults=faults, data=EVEN))
        steps_of(method, 1)
        method.clients.references[1]._accumulated = torch.full_like(
            torch.cat([p.flatten() for p in method.clients.references[1].parameters()]), wrong
        )
        return method

    with pytest.raises(DivergedError, match=r"client 1: .*gradients hold .*Lower training") as told:
        poisoned().step(1, 1)
    assert "offer_key, step 1" in str(told.value)
    method = poisoned(on_nonfinite="skip_client")
    method.step(1, 1)
    assert "client 1 is left out" in caplog.text and not method.clients.lost
    assert all(c._accumulated is None for c in method.clients.references.values())
    method.step(2, 2)
    one, other, *_ = (c.tokenizer_weights() for c in method.clients.references.values())
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("mode", "every"), [("gradients", 3), ("weights", 2)])
def test_a_resumed_run_is_the_same_to_the_last_bit(mode: str, every: int, tmp_path: Path) -> None:
    """The masks are others, and leave no trace in the sums."""
    chosen = experiment(mode, every)
    whole, first, again = (in_one_process(chosen) for _ in range(3))
    expected = steps_of(whole, STEPS)
    steps_of(first, 4)
    again.restore(str(tmp_path), first.save(str(tmp_path)))
    again.begin_epoch(0, 4)
    losses = []
    for step in range(4, STEPS):
        epoch, epoch_step = divmod(step, len(again.plan))
        if epoch_step == 0:
            again.begin_epoch(epoch)
        losses.append(again.step(epoch_step, step))
    assert losses == expected[4:]
    for n, client in again.clients.references.items():
        other = whole.clients.references[n].tokenizer_weights()
        assert all(torch.equal(x, other[key]) for key, x in client.tokenizer_weights().items())


# -- bytes, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("share", ["proportional", "equal"])
@pytest.mark.parametrize(("mode", "every"), [("none", 1), ("gradients", 2), ("weights", 3)])
def test_counted_bytes_are_the_computed_ones(mode: str, every: int, share: str) -> None:
    training = {"precision": "float32", "epochs": 2}
    chosen = experiment(mode, every, client_share=share, clients=5, training=training)
    method = in_one_process(chosen)
    steps_of(method, method.total_steps)
    method.evaluate()
    method.deployable()
    parts = flops.build(chosen, inputs_of(chosen))
    found = traffic_model.training(parts, method.plan, 2)
    nobody = np.zeros(5, dtype=np.int64)
    for sent in (traffic_model.testing(parts, nobody), traffic_model.exporting(parts, 5)):
        found |= {kind: found.get(kind, 0) + each for kind, each in sent.items()}
    computed = {kind: x.tolist() for kind, x in found.items() if x.any()}
    assert method.traffic.by_kind() == computed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fedavg"}, "under method=fedavg nothing is masked"),
        ({"method": "centralized"}, "under method=centralized nothing is masked"),
        ({"model": {"train_tokenizers": False}}, "frozen tokenizers are as everybody"),
        ({"clients": 1}, "1 clients; a sum of fewer than 3"),
        ({"clients": 2}, "2 clients; a sum of fewer than 3"),
        ({"faults": {"min_clients": 2}}, "go on with 2; set faults.min_clients=3"),
        ({"training": {"evaluate_own": True}}, "take data.test_at=clients"),
    ],
)
def test_what_masks_cannot_do_is_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_sync\.masked: ") as told:
        experiment(**changes)
    assert words in str(told.value)


def test_data_of_their_owners_and_runs_that_stop_at_a_loss_may_be_masked() -> None:
    assert experiment(data={"place": "own"}).tokenizer_sync.masked
    assert experiment(faults={"min_clients": 1, "on_loss": "stop"}).tokenizer_sync.masked


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def lacking(name: str, *words: Any) -> Any:
        return None if name == "cryptography" else found(name, *words)

    monkeypatch.setattr(importlib.util, "find_spec", lacking)
    with pytest.raises(ConfigError, match=r"pip install 'mpsl_dist\[privacy\]'"):
        in_one_process(experiment())
    in_one_process(experiment(masked=False))
