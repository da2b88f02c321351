"""A method's real clients and server in this process, and what the server hears of them.

Shape legend: ``n`` samples of a client, ``l`` length in tokens, ``d`` width, ``k`` what a
prediction has.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsl_dist import plugins
from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.holdings import Holdings, loaders_of
from mpsl_dist.actors.host import Host
from mpsl_dist.actors.local_data import LocalData, batch_sizes
from mpsl_dist.actors.references import Local
from mpsl_dist.analysis.audit.halves import Halves
from mpsl_dist.analysis.audit.wiretap import Message, Wiretap
from mpsl_dist.config import Experiment, Faults
from mpsl_dist.config.methods import METHODS, facts_of, options_of
from mpsl_dist.data import TensorDataset
from mpsl_dist.data.partition import Dealt, mini_batches
from mpsl_dist.errors import ConfigError
from mpsl_dist.methods.hosting import BuildClients, Setup
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.codecs import decode
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.reading import read_json

#: Clients that are attacked, at most: the first ones of the run.
CLIENTS = 10


@dataclass(frozen=True)
class Heard:
    """What crossed of one client's samples, beside what it was made of.

    Attributes
    ----------
    inputs, labels_n
        The truth, which no attack sees.
    tokens : list of Tensor
        (n, l, d) as they arrived.
    of_predictions_nk : Tensor or None
        Gradients that the client sent back for what the server had sent.
    of_tokens : list of Tensor or None
        (n, l, d): gradients of the tokens.
    of_vectors : list of (Tensor, Tensor)
        Gradients of all its parameters that the client sent, as of a mean over samples, with the
        labels of these.
    """

    client: int
    inputs: dict[str, Tensor]
    labels_n: Tensor
    tokens: list[Tensor]
    of_predictions_nk: Tensor | None
    of_tokens: list[Tensor] | None
    of_vectors: list[tuple[Tensor, Tensor]]


class Victim:
    """A run's method with its first clients in this process; they hold the audited samples.

    Parameters
    ----------
    experiment : Experiment
        Of a method that cuts the model.
    halves : Halves

    Raises
    ------
    UserError
        If there is nothing of the kind to attack.
    """

    def __init__(self, experiment: Experiment, halves: Halves) -> None:
        refuse(experiment)
        # The attacks compute there, with these tokenizers and with others.
        experiment = replace(experiment, device="cpu")
        alone = replace(experiment.server, replicas=1)
        data = replace(experiment.data, loaders=0, place="simulated", test_at="server")
        training = replace(experiment.training, compile=False)
        self.experiment = replace(
            experiment, server=alone, data=data, training=training, faults=Faults(on_loss="stop")
        )
        self.numbers = range(min(experiment.clients, CLIENTS))
        #: As its clients know it: what they draw depends on all of it.
        self._own = experiment
        rows = np.arange(len(halves.audited.labels))
        parts = [rows[n :: len(self.numbers)] for n in self.numbers]
        nothing = [rows[:0]] * experiment.clients
        dealt = Dealt([*parts, *nothing[len(parts) :]], "audited samples, in turns")
        splits, loaders = halves.splits, loaders_of(self.experiment, halves.splits)
        holdings = Holdings(self.experiment, splits, dealt, tuple(nothing), loaders)
        setup = Setup(
            self.experiment, holdings, 1, options=options_of(experiment), transport=self._open
        )
        self._holdings = holdings
        #: What everybody begins with, as the attacker builds it from the configuration.
        self.initial = build_tokenizers(self.experiment, splits)
        self.method = plugins.resolve(facts_of(experiment).build)(setup)

    def _open(self, build: BuildClients) -> Wiretap:
        clients = build(self._own, self.numbers, self._holdings, Local)
        self.wiretap = Wiretap(Host(clients))
        return self.wiretap

    @property
    def clients(self) -> dict[int, Any]:
        """The clients themselves, by number."""
        return dict(self.wiretap.host.clients)

    def restore(self, folder: Path) -> None:
        """Continue from a run's checkpoint.

        Raises
        ------
        RunError
            If a part of it is missing or damaged.
        """
        files = read_json(folder / "manifest.json").get("files", {})
        self.method.restore(str(folder.absolute()), files)

    def listen(self) -> Iterator[list[Message]]:
        """Train through the audited samples once, nothing moving; yield every step's messages."""
        # What the server has kept of an earlier time crosses again.
        self.method.clients.begin_training(len(self.method.plan), 1)
        self.method.begin_epoch(0)
        self.wiretap.take()
        for step in range(len(self.method.plan)):
            with _unmoved([*self.clients.values(), self.method.server.stepper]):
                self.method.step(step, step)
            yield self.wiretap.take()

    def hear(self) -> list[Heard]:
        """Return what every client lets out of its samples, beside these; raises as a step does."""
        found: dict[int, list[Heard]] = {}
        waiting: dict[int, list[Tensor]] = {n: [] for n in self.numbers}
        plan, held = self.method.plan, self._holdings
        rows = {
            n: mini_batches(held.sizes[n], plan[:, n].tolist(), self.experiment.seed, n, 0)
            for n in self.numbers
        }
        for step, messages in enumerate(self.listen()):
            size = int(plan[step].sum())
            for n in np.flatnonzero(plan[step]).tolist():
                # The truth, from the data themselves: a client may tell its own task another.
                batch = held.splits.train.fetch(held.dealt.parts[n][rows[n][step]].tolist())
                parameters = self.clients[n].parameters()
                own = [m for m in messages if m.client == n]
                heard = _one(n, batch.inputs, batch.labels, own)
                waiting[n].append(batch.labels)
                for vector in _vectors(own, sum(p.numel() for p in parameters)):
                    labels = torch.cat(waiting[n])
                    heard.of_vectors.append((vector * (size / len(labels)), labels))
                    waiting[n] = []
                found.setdefault(n, []).append(heard)
        return [_joined(found[n]) for n in sorted(found)]

    def weights_fetched(self) -> tuple[Tokenizers | None, dict[int, Tokenizers]]:
        """Fetch a model to deploy as a run does; return its tokenizers, where there is one, and
        by client what it answered by itself.
        """
        self.wiretap.take()
        model = self.method.deployable()
        own = {}
        for message in self.wiretap.take():
            if message.name == "tokenizer_weights" and (it := self._with(message.answer)):
                own[message.client] = it
        mean = None if model is None else self._with(trainable_state(model.tokenizers))
        return mean, own

    def _with(self, weights: Mapping[str, Tensor] | None) -> Tokenizers | None:
        """Return tokenizers with these weights; None if they are weights of something else."""
        built = copy.deepcopy(self.initial)
        own = {name: p.shape for name, p in built.named_parameters() if p.requires_grad}
        found = weights if isinstance(weights, Mapping) else {}
        found = {name: x for name, x in found.items() if name in own}
        if own != {name: x.shape for name, x in found.items()}:
            return None
        load_trainable(built, found)
        return built

    def pairs(
        self, client: int, tokenizers: Tokenizers, samples: TensorDataset
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return what a client with these tokenizers would send of some samples, and these.

        The attacker runs a client's code, which is public, on samples of its own.

        Returns
        -------
        list of Tensor, dict of str to Tensor
            (n, l, d) as they would arrive; the inputs by modality, in the same order.
        """
        attacker = copy.copy(self.clients[client])
        attacker.tokenizers = Local(tokenizers)
        attacker.data = LocalData(samples, np.arange(len(samples.labels)), 0, client)
        counts = batch_sizes(len(samples.labels), self.experiment.training.batch_size)
        attacker.begin_epoch(0, counts, 0)
        tokens, batches = [], []
        with torch.no_grad():
            for step in range(len(counts)):
                tokens.append([x.detach().cpu() for x in decode(attacker.tokenize(step))])
                batches.append(attacker.data.batch(step).inputs)
        inputs = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        return [torch.cat(parts) for parts in zip(*tokens, strict=True)], inputs


def refuse(experiment: Experiment) -> None:
    """Refuse methods whose server hears no activations, samples that lack parts, and soft tokens,
    which no attack reads.
    """
    if experiment.data.missing.rate and not experiment.data.missing.zeros:
        raise ConfigError(
            "data.missing.rate: audit attacks whole samples; set 0, or data.missing.zeros=true"
        )
    if experiment.model.connector.tokens:
        raise ConfigError(
            "model.connector.tokens: audit attacks tokens of one modality each, and knows no "
            "attack on a connector's; nothing is said of what these leak"
        )
    facts = facts_of(experiment)
    if facts.unimodal:
        raise ConfigError(
            f"method: audit's attacks know one encoder of all modalities, {experiment.method} has "
            "one for each; what its clients send stands in actors/unimodal_client.py"
        )
    if facts.split and not facts.one_process:
        return
    split = [
        name
        for name, own in METHODS.items()
        if own.split and not own.one_process and not own.unimodal
    ]
    what = "has no clients" if facts.one_process else "sends weights alone"
    what = "sends no tensor at all" if facts.alone else what
    raise ConfigError(
        f"method: {experiment.method} {what}: audit attacks what crosses the cut of "
        f"{', '.join(split)}, and says nothing of what weights leak"
    )


@contextmanager
def _unmoved(owners: Sequence[Any]) -> Iterator[None]:
    parameters = [p for owner in owners for p in _parameters(owner)]
    before = [p.detach().clone() for p in parameters]
    yield
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _parameters(owner: Any) -> Sequence[Tensor]:
    return owner.parameters() if callable(owner.parameters) else owner.parameters


def _one(
    client: int, inputs: Mapping[str, Tensor], labels: Tensor, messages: Sequence[Message]
) -> Heard:
    """Tell what is in a step's messages by shapes alone."""
    tokens, of_tokens, back = [], [], []
    for message in messages:
        arrived = _tensors(message.answer)
        tokens += [x for x in arrived if x.dim() == 3 and len(x) == len(labels)]
        of_tokens += [x for x in message.of_answer if x.dim() == 3 and len(x) == len(labels)]
        back += [x.flatten(1) for x in message.of_sent if x.dim() >= 2 and len(x) == len(labels)]
    whole = len(of_tokens) == len(tokens) > 0
    first = back[0] if back else None
    return Heard(client, dict(inputs), labels, tokens, first, of_tokens if whole else None, [])


def _vectors(messages: Sequence[Message], numbers: int) -> list[Tensor]:
    arrived = [x for message in messages for x in _tensors(message.answer)]
    return [x for x in arrived if x.dim() == 1 and len(x) == numbers]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _tensors(part)] if isinstance(value, list) else []


def _joined(parts: list[Heard]) -> Heard:
    """Return mini-batches as one; of those that differ in kind, the most frequent kind alone."""

    def kind(one: Heard) -> tuple[Any, ...]:
        shapes = tuple(x.shape[1:] for x in one.tokens)
        back = None if one.of_predictions_nk is None else one.of_predictions_nk.shape[1:]
        return shapes, back, one.of_tokens is None

    (usual, _), *_ = Counter(map(kind, parts)).most_common(1)
    alike = [one for one in parts if kind(one) == usual]
    first = alike[0]
    return Heard(
        first.client,
        {name: torch.cat([one.inputs[name] for one in alike]) for name in first.inputs},
        torch.cat([one.labels_n for one in alike]),
        [torch.cat(x) for x in zip(*(one.tokens for one in alike), strict=True)],
        None
        if first.of_predictions_nk is None
        else torch.cat([one.of_predictions_nk for one in alike]),
        None
        if first.of_tokens is None
        else [torch.cat(x) for x in zip(*(one.of_tokens for one in alike), strict=True)],
        [pair for one in alike for pair in one.of_vectors],
    )
