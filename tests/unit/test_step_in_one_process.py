"""A step of MPSL without RPC: the same actors, messages and method in one process."""

from __future__ import annotations

import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.errors import RemoteError
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl
from mpsl_dist.models.average import trainable_state

STEPS = 5
CASES = {
    "early": {},
    "late": {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}},
    "dry clients": {"client_share": "equal"},
    "retrieval": {"data": {"name": "toy-pairs"}, "clients": 3},
    "global contrast": {"data": {"name": "toy-pairs"}, "clients": 3, "contrastive": "global"},
    "pictures": {"data": {"name": "toy-pairs", "unit": "picture"}, "clients": 3},
}


def experiment(**changes) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    return toys.experiment(training=training, **changes)


def train(method: Mpsl, steps: int = STEPS) -> list[float]:
    return steps_of(method, steps)


@pytest.mark.parametrize("case", CASES)
def test_it_equals_plain_training_as_the_steps_over_rpc_do(case: str) -> None:
    """The reference is the one of ``tests/multiprocess/test_exactness.py``."""
    chosen = experiment(**CASES[case])
    method, expected = in_one_process(chosen), reference.train(chosen, STEPS)
    assert train(method) == pytest.approx(expected["losses"], rel=1e-12)
    for key, value in expected["server"].items():
        torch.testing.assert_close(method.server.model.state_dict()[key], value, rtol=0, atol=1e-9)
    for number, state in expected["clients"].items():
        own = method.clients.references[number].tokenizer_weights()
        assert own.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_naive_psl_and_mpsl_agree_under_every_sync(mode: str) -> None:
    chosen = experiment(tokenizer_sync={"mode": mode, "every": 2})
    ours, theirs = in_one_process(chosen), in_one_process(chosen, Psl)
    assert train(ours) == pytest.approx(train(theirs), rel=1e-10)
    assert ours.traffic.by_kind() == theirs.traffic.by_kind()
    for number, client in ours.clients.references.items():
        other = theirs.clients.references[number].tokenizer_weights()
        for key, value in client.tokenizer_weights().items():
            torch.testing.assert_close(value, other[key], rtol=0, atol=1e-10)


def test_the_messages_of_a_step_are_the_papers_five() -> None:
    method = in_one_process(experiment())
    train(method, 1)
    calls = method.clients.calls
    everyone = [0, 1, 2, 3]
    first = calls.index(("tokenize", everyone))
    assert calls[first:] == [("tokenize", everyone), ("loss", everyone), ("step", everyone)]


def test_a_client_receives_its_own_gradients_alone() -> None:
    """All clients of a process share one backward; its gradients are handed out one by one."""
    method = in_one_process(experiment())
    seen: dict[int, set] = {}
    for number, client in method.clients.references.items():
        client.step = lambda step, gradients, n=number: seen.update({n: set(gradients)})
    train(method, 1)
    for number, client in method.clients.references.items():
        assert seen[number] and seen[number] <= set(client.parameters())


def test_one_clients_error_costs_no_neighbour_its_answer() -> None:
    method = in_one_process(experiment(faults={"on_loss": "stop"}))

    def fail(step: int) -> None:
        raise OSError("clip_0042.mp4: truncated")

    method.clients.references[2].tokenize = fail
    method.begin_epoch(0)
    answers = method.clients.fleet.start("tokenize", {n: (0,) for n in range(4)}, "step 0")()
    assert list(answers.by_client) == [0, 1, 3] and list(answers.lost) == [2]
    before = trainable_state(method.server.model)
    with pytest.raises(RemoteError, match="step 0: client 2: OSError: clip_0042") as error:
        method.step(0, 0)
    assert error.value.lost == (2,) and method.clients.lost == {2}
    after = trainable_state(method.server.model)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_message_with_tensors_that_nobody_counts_is_refused() -> None:
    method = in_one_process(experiment())
    with pytest.raises(AssertionError, match="uncounted"):
        method.clients.start("tokenizer_weights", {0: ()})()
