"""The tables of what a client sends name every message that a recording finds, and no other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import toys
from local_fleet import in_one_process, steps_of

from mpsl_dist.actors import (
    client,
    edge_device,
    federated_client,
    standalone_client,
    unimodal_client,
)
from mpsl_dist.actors.host import Host
from mpsl_dist.errors import Failure

#: What a host asks of every client that sends nothing: no message.
OWN_BUSINESS = {"parameters"}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"tokenizer_sync": {"mode": "gradients", "every": 2}},
    {"tokenizer_sync": {"mode": "weights", "every": 2}, "data": {"test_at": "clients"}},
    {"tokenizer_sync": {"mode": "gradients", "every": 1, "masked": True}},
    {"data": {"name": "toy-pairs"}, "contrastive": "global"},
)


def table(module: Any) -> dict[str, str]:
    """Return the rows of a module's boundary table: message -> what it is and tells."""
    row = re.compile(r"^``(\w+)`` +(.*(?:\n +.*)*)", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in row.findall(module.__doc__)}


def sent_by(kind: type) -> set[str]:
    """Return the methods of a kind of client that return something, by their annotations."""
    public = inspect.getmembers(kind, inspect.isfunction)
    annotated = {n: f.__annotations__.get("return") for n, f in public if not n.startswith("_")}
    return {name for name, type_ in annotated.items() if type_ != "None"} - OWN_BUSINESS


@pytest.mark.parametrize(
    "module, kind",
    [
        (client, client.Client),
        (federated_client, federated_client.FederatedClient),
        (standalone_client, standalone_client.StandaloneClient),
        (edge_device, edge_device.EdgeDevice),
    ],
    ids=["split", "federated", "standalone", "edge"],
)
def test_the_table_has_whatever_a_client_may_answer_and_what_it_tells(
    module: Any, kind: type
) -> None:
    rows = table(module)
    assert rows.keys() == sent_by(kind)
    assert [name for name, text in rows.items() if "tells" not in text] == []


def test_a_unimodal_client_sends_nothing_else_and_says_what_more_it_tells() -> None:
    assert sent_by(unimodal_client.UnimodalClient) == sent_by(client.Client)
    changed = set(vars(unimodal_client.UnimodalClient)) & sent_by(client.Client)
    rows = table(unimodal_client)
    assert changed == {"loss"} and rows.keys() == {"loss", "tokenize"}
    assert [name for name, text in rows.items() if "tell" not in text] == []


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """All that clients of this process answer, by message."""
    found: dict[str, list[Any]] = {}
    serve = Host.serve

    def recorded(self: Host, message: str, *words: Any) -> Mapping[int, Any]:
        outcomes = serve(self, message, *words)
        given: Sequence[Any] = [x for x in outcomes.values() if x is not None]
        assert not any(isinstance(x, Failure) for x in given), given
        if given:
            found.setdefault(message, []).extend(given)
        return outcomes

    monkeypatch.setattr(Host, "serve", recorded)
    yield found


def test_a_recording_has_no_answer_that_the_table_lacks_and_all_that_it_has(
    answered: dict[str, list[Any]], tmp_path: Any
) -> None:
    for number, changes in enumerate(VARIANTS):
        method = in_one_process(
            toys.experiment(**changes, output=str(tmp_path), faults={"min_clients": 3})
        )
        list(method.read_tests())
        steps_of(method, len(method.plan))
        method.damage_met()
        method.evaluate()
        folder = str(tmp_path / f"checkpoint-{number}")
        method.damage(folder, method.save(folder))
        if method.sync.identical and not method.experiment.tokenizer_sync.masked:
            method.clients.hand_over([0], [1])
        method.clients.start("damage", {0: (str(tmp_path / "none"), None)})()
    assert set(answered) == set(table(client))
