"""Samples that lack parts: no tokens of what is absent, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.actors.holdings import Holdings
from mpsl_dist.analysis import flops, gapped_traffic, traffic_model
from mpsl_dist.analysis.cost_inputs import inputs_of
from mpsl_dist.config import Experiment, to_dict
from mpsl_dist.data import gaps
from mpsl_dist.methods.mpsl import Mpsl
from mpsl_dist.methods.psl import Psl

STEPS = 4
#: At this seed client 1 has both modalities, 0 and 2 hear only, 3 sees only.
MISSING = {"rate": 0.5, "seed": 3}


def experiment(data: dict | None = None, **changes) -> Experiment:
    training = to_dict(toys.experiment())["training"] | {"precision": "float64"}
    chosen = {"name": "toy-image+audio", "missing": MISSING} | (data or {})
    changes = {"faults": {"rejoin": "never"}} | changes
    return toys.experiment(**{"training": training} | changes, data=chosen)


def assert_equal_to_reference(method: Mpsl, chosen: Experiment) -> None:
    expected = reference.train(chosen, STEPS)
    assert steps_of(method, STEPS) == pytest.approx(expected["losses"], rel=1e-12)
    for key, value in expected["server"].items():
        torch.testing.assert_close(method.server.model.state_dict()[key], value, rtol=0, atol=1e-9)
    for number, state in expected["clients"].items():
        own = method.clients.references[number].tokenizer_weights()
        assert own.keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(own[key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
@pytest.mark.parametrize("per", ["client", "sample"])
@pytest.mark.parametrize("fusion", ["early", "late"])
def test_training_equals_that_of_each_sample_by_itself(fusion: str, per: str, mode: str) -> None:
    """The reference has no mask: it encodes every sample alone, of its present tokens."""
    sync = {"mode": mode, "every": 2}
    chosen = experiment(
        {"missing": MISSING | {"per": per}}, model={"fusion": fusion}, tokenizer_sync=sync
    )
    assert_equal_to_reference(in_one_process(chosen), chosen)


CASES = {
    "mean of tokens": {"model": {"pooling": "mean", "post_norm": True}},
    "mean of tokens, late": {"model": {"pooling": "mean", "fusion": "late"}},
    "heads at clients": {"model": {"head_at": "client"}, "tokenizer_sync": {"mode": "weights"}},
    "computed again": {"checkpoint_blocks": True},
    "gaps of the data's own": {"data": {"name": "toy-gaps", "missing": {}}},
}


@pytest.mark.parametrize("case", CASES)
def test_so_it_is_with_other_options(case: str) -> None:
    options = dict(CASES[case])
    again = {"checkpoint_blocks": options.pop("checkpoint_blocks", False)}
    training = to_dict(experiment())["training"] | again
    chosen = experiment(options.pop("data", None), training=training, **options)
    assert_equal_to_reference(in_one_process(chosen), chosen)


@pytest.mark.parametrize("mode", ["none", "gradients", "weights"])
def test_naive_psl_takes_the_same_steps(mode: str) -> None:
    chosen = experiment(tokenizer_sync={"mode": mode, "every": 2})
    assert_equal_to_reference(in_one_process(chosen, Psl), chosen)


def test_draws_are_nested_and_leave_nobody_with_nothing() -> None:
    drawn = [gaps.draw(rate, 2000, 3, [7]) for rate in (0.0, 0.2, 0.5, 0.9)]
    assert drawn[0].all() and all(present.any(1).all() for present in drawn)
    for few, more in zip(drawn, drawn[1:], strict=False):
        assert not (more & ~few).any() and more.sum() < few.sum()
    # Of 0.2^3 of the rows one cell comes back.
    assert abs(1 - drawn[1].mean() - (0.2 - 0.2**3 / 3)) < 0.01
    assert not np.array_equal(drawn[2], gaps.draw(0.5, 2000, 3, [8]))


# -- what crosses --------------------------------------------------------------------------------


def whole_run(chosen: Experiment) -> Mpsl:
    """Two epochs, a test after each, and the model to deploy."""
    method = in_one_process(chosen)
    for epoch in range(2):
        method.begin_epoch(epoch)
        for step in range(len(method.plan)):
            method.step(step, epoch * len(method.plan) + step)
        method.evaluate()
    method.deployable()
    return method


AT_CLIENTS = {"test_at": "clients", "missing": MISSING | {"at_test": True}}
TRAFFIC = {
    "early": {},
    "late": {"model": {"fusion": "late"}, "tokenizer_sync": {"mode": "weights", "every": 2}},
    "by sample": {"data": {"missing": MISSING | {"per": "sample"}}},
    "gradients": {"tokenizer_sync": {"mode": "gradients", "every": 3}},
    "at clients": {"data": AT_CLIENTS, "training": {"evaluate_own": True}},
    "identical at clients": {"data": AT_CLIENTS, "tokenizer_sync": {"mode": "gradients"}},
    "coded": {"wire": {"activations": "int8", "gradients": "int4"}, "data": AT_CLIENTS},
    "coded late": {
        "wire": {"activations": "bf16"},
        "model": {"fusion": "late"},
        "data": {"missing": MISSING | {"per": "sample"}},
    },
    "heads": {"model": {"head_at": "client"}, "tokenizer_sync": {"mode": "weights"}},
    "the data's own": {"data": {"name": "toy-gaps", "missing": {}}},
    "frozen": {"model": {"train_tokenizers": False}},
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_counted_bytes_are_the_computed_ones(case: str) -> None:
    options = dict(TRAFFIC[case])
    training = to_dict(experiment())["training"] | options.pop("training", {})
    chosen = experiment(options.pop("data", None), training=training, **options)
    method, parts = whole_run(chosen), flops.build(chosen, inputs_of(chosen))
    found = gapped_traffic.gaps_of(Holdings.load(chosen))
    tests = np.array(list(method.test_sizes.values()))
    total = traffic_model.training(parts, method.plan, 2, found)
    once = traffic_model.exporting(parts, chosen.clients, found)
    for kind, each in traffic_model.testing(parts, tests, found).items():
        total[kind] = each * 2 + once.get(kind, 0)
    computed = {kind: x.tolist() for kind, x in total.items() if x.any()}
    assert method.traffic.by_kind() == computed
