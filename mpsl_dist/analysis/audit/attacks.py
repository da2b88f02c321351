"""What the attacks of a step share, and those on labels and on samples as a whole.

Knowledge of a client's weights: ``initial`` (those that everybody begins with, from seed or
pretrained files), ``average`` (the mean at the last evaluation), ``own`` (what the client itself
answers at an evaluation), ``none`` (pairs of public samples and tokens alone).

Shape legend: ``n`` samples, ``m`` candidates, ``l`` tokens, ``d`` width, ``k`` classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.analysis.audit import labels, matching, scores
from mpsl_dist.analysis.audit.figures import Audit, Figure
from mpsl_dist.analysis.audit.halves import Halves, keys
from mpsl_dist.analysis.audit.victim import Heard, Victim
from mpsl_dist.data import TensorDataset
from mpsl_dist.models.tokenizers import Tokenizers

_CONTROL = "control: labels permuted"


@dataclass
class Scene:
    """What the attacks of a step share.

    Attributes
    ----------
    knowledge : dict of str to dict of int to Tokenizers
        Level -> client -> the weights that the attacker takes for its.
    true : dict of int to Tokenizers
        The clients' own: what made the pairs of knowledge ``none``.
    """

    step: int
    victim: Victim
    halves: Halves
    heard: Sequence[Heard]
    knowledge: Mapping[str, Mapping[int, Tokenizers]]
    true: Mapping[int, Tokenizers]
    audit: Audit
    _sent: dict[tuple[int, int], tuple[list[Tensor], dict[str, Tensor], Any]] = field(
        default_factory=dict
    )

    def add(
        self,
        attack: tuple[str, str, str],
        metric: str,
        score: scores.Score,
        floor: float,
        samples: int,
        ceiling: float = 1.0,
    ) -> None:
        """Keep a figure; ``attack`` is how, with what knowledge, of what."""
        self.audit.figures.append(
            Figure.found(self.step, attack, metric, score, floor, samples, ceiling)
        )

    def sent_by(
        self, client: int, tokenizers: Tokenizers, samples: TensorDataset
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return :meth:`Victim.pairs`; clients with the same tokenizers send the same."""
        key = (id(tokenizers), id(samples))
        if key not in self._sent:
            # Both are kept: what comes after them must not come to have their identity.
            kept = tokenizers, samples
            self._sent[key] = (*self.victim.pairs(client, tokenizers, samples), kept)
        tokens, inputs, _ = self._sent[key]
        return tokens, inputs


def by_modality(tokens: Sequence[Tensor], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tokens (n, l_m, d) of each modality, told apart by their numbers alone.

    Empty where no choice of modalities has as many.
    """
    for count in range(len(lengths), 0, -1):
        for names in combinations(lengths, count):
            wanted = [lengths[name] for name in names]
            if [x.shape[1] for x in tokens] == wanted:
                return dict(zip(names, tokens, strict=True))
            if len(tokens) == 1 and tokens[0].shape[1] == sum(wanted):
                return dict(zip(names, tokens[0].split(wanted, dim=1), strict=True))
    return {}


# -- labels ------------------------------------------------------------------------------------


def attack_labels(scene: Scene) -> None:
    """Guess labels from whatever gradients arrived, and from those that the server sent back."""
    classes = len(scene.halves.splits.classes)
    if not classes:
        scene.audit.note("labels: none, the task has no classes")
        return
    labels_n = torch.cat([one.labels_n for one in scene.heard])
    back = _together([one.of_predictions_nk for one in scene.heard])
    cut = _together([_mean_token(one.of_tokens) for one in scene.heard])
    returned = "gradient of predictions"
    if back is None:
        scene.audit.note("labels: no gradient came back for what the server had sent")
    elif back.shape[1] == classes:
        guess_n = labels.from_logits(back)
        _add_labels(scene, ("smallest entry", returned), guess_n, labels_n)
    else:  # a head follows at the client
        returned = "gradient of features"
    for of, gradient in ((returned, back), ("cut-layer gradient", cut)):
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            continue
        guess_n, hidden_n = labels.by_clusters(gradient, classes, labels_n)
        _add_labels(scene, ("clusters", of), guess_n[hidden_n], labels_n[hidden_n])
        _score_classes(scene, gradient, labels_n, of)
    _count_labels(scene, classes)


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    if any(x is None for x in parts) or len({x.shape[1] for x in parts}) > 1:
        return None
    return torch.cat(list(parts))


def _mean_token(of_tokens: Sequence[Tensor] | None) -> Tensor | None:
    if of_tokens is None:
        return None
    return torch.cat([x_nld.mean(1) for x_nld in of_tokens], dim=1)


def _add_labels(scene: Scene, attack: tuple[str, str], guess_n: Tensor, labels_n: Tensor) -> None:
    if not len(labels_n):
        return
    how, of = attack
    floor = max(Counter(labels_n.tolist()).values()) / len(labels_n)
    right = scores.share(guess_n == labels_n)
    scene.add((how, "none", of), "labels", right, floor, len(labels_n))
    generator = torch.Generator().manual_seed(scene.victim.experiment.seed)
    permuted_n = labels_n[torch.randperm(len(labels_n), generator=generator)]
    each = [Counter(x.tolist()) for x in (guess_n, labels_n)]
    chance = sum(each[0][c] * each[1][c] for c in each[0]) / len(labels_n) ** 2
    found = scores.share(guess_n == permuted_n)
    scene.add((f"{_CONTROL}, {how}", "none", of), "labels", found, chance, len(labels_n))


def _score_classes(scene: Scene, gradient_nd: Tensor, labels_n: Tensor, of: str) -> None:
    """Tell the largest class from the rest by a gradient's length, and by its direction."""
    (largest, count), *_ = Counter(labels_n.tolist()).most_common(1)
    if count in (1, len(labels_n)):
        return
    positive_n = (labels_n == largest).numpy()
    length_n = labels.norms(gradient_nd)
    area = scores.auc(length_n, positive_n)
    either = scores.Score(max(area.value, 1 - area.value), area.error)
    rng = np.random.default_rng(0)
    chance = [scores.auc_alone(length_n, rng.permutation(positive_n)) for _ in range(50)]
    floor = float(np.mean([max(a, 1 - a) for a in chance]))
    scene.add(("length, either way", "none", of), "label_auc", either, floor, len(labels_n))
    known = int(positive_n.argmax())
    others = np.arange(len(labels_n)) != known
    cosine_n = labels.cosines(gradient_nd, known)
    area = scores.auc(cosine_n[others], positive_n[others])
    scene.add(("direction, one known", "none", of), "label_auc", area, 0.5, len(labels_n) - 1)


def _count_labels(scene: Scene, classes: int) -> None:
    """Count the labels of mini-batches from the gradient of a head's bias, where one is sent."""
    right = total = usual = 0
    for one in scene.heard:
        shapes = [tuple(p.shape) for p in scene.victim.clients[one.client].parameters()]
        if (classes,) not in shapes:
            return
        last = len(shapes) - 1 - shapes[::-1].index((classes,))
        start = sum(int(np.prod(shape)) for shape in shapes[:last])
        for vector, labels_b in one.of_vectors:
            even_k = torch.full((classes,), 1 / classes)
            bias_k = vector[start : start + classes]
            guess_k = labels.counts_from_bias(bias_k, even_k, len(labels_b))
            true_k = torch.bincount(labels_b, minlength=classes)
            right += int(torch.minimum(guess_k, true_k).sum())
            usual += int(true_k.max())
            total += len(labels_b)
    if total:
        score = scores.Score(
            right / total, float(np.sqrt(right / total * (1 - right / total) / total))
        )
        attack = ("gradient of the head's bias", "none", "synchronised gradients")
        scene.add(attack, "label_counts", score, usual / total, total)


# -- samples as a whole ------------------------------------------------------------------------


def attack_samples(scene: Scene) -> None:
    """Find every sample among candidates, and tell which candidates were there at all."""
    halves = scene.halves
    count = len(halves.audited.labels)
    others = min(count, len(halves.public.labels))
    inputs = {
        name: torch.cat([x, halves.public.inputs[name][:others]])
        for name, x in halves.audited.inputs.items()
    }
    labels_m = torch.cat([halves.audited.labels, halves.public.labels[:others]])
    candidates = TensorDataset(inputs, labels_m)
    _match(scene, candidates, list(inputs), "sample")
    for name, tokenizer in next(iter(scene.true.values())).by_modality.items():
        if not inputs[name].is_floating_point() and not hasattr(tokenizer, "table"):
            _match(scene, candidates, [name], name)


def _match(scene: Scene, candidates: TensorDataset, names: Sequence[str], of: str) -> None:
    """Match what arrived of these modalities with candidates, at every level of knowledge."""
    there = {tuple(key) for key in keys(scene.halves.audited, names)}
    for level, weights in scene.knowledge.items():
        trials = [_distances(scene, weights, candidates, names, place) for place in (0, 1)]
        if any(trial is None for trial in trials):
            scene.audit.note(f"{of}: no client's tokens have the number of a candidate's")
            return
        found = []
        for right_n, chance, nearest in trials:
            score_m = -np.array(list(nearest.values()))
            member_m = np.array([key in there for key in nearest])
            found.append(
                (scores.share(right_n), chance, scores.auc(score_m, member_m), len(score_m))
            )
        same, chance, _, _ = max(found, key=lambda one: one[0].value)
        samples = len(trials[0][0])
        scene.add(("nearest candidate", level, of), "reidentified", same, chance, samples)
        _, _, area, count = max(found, key=lambda one: one[2].value)
        scene.add(("distance to the nearest", level, of), "membership", area, 0.5, count)


def _distances(
    scene: Scene,
    weights: Mapping[int, Tokenizers],
    candidates: TensorDataset,
    names: Sequence[str],
    place: int,
) -> tuple[list[bool], float, dict[tuple[bytes, ...], float]] | None:
    """Return whose nearest candidate is itself, by chance how often, and every candidate's nearest.

    ``place`` picks one of the distances of :func:`matching.distances`.
    """
    right_n, chances, nearest = [], [], {}
    for one in scene.heard:
        known = weights[one.client]
        sent, inputs = scene.sent_by(one.client, known, candidates)
        lengths = dict(zip(known.by_modality, known.lengths, strict=True))
        pairs = [by_modality(tokens, lengths) for tokens in (one.tokens, sent)]
        if any(set(names) - set(pair) for pair in pairs):
            continue
        arrived, offered = ([pair[name] for name in names] for pair in pairs)
        distance_nm = matching.distances(arrived, offered)[place]
        truth = keys(TensorDataset(one.inputs, one.labels_n), names)
        offers = [tuple(key) for key in keys(TensorDataset(inputs, candidates.labels), names)]
        for key, row_m in zip(truth, distance_nm, strict=True):
            right_n.append(offers[int(row_m.argmin())] == tuple(key))
            chances.append(offers.count(tuple(key)) / len(offers))
        for offer, distance in zip(offers, distance_nm.min(0).values.tolist(), strict=True):
            nearest[offer] = min(distance, nearest.get(offer, float("inf")))
    return (right_n, float(np.mean(chances)), nearest) if right_n else None
