"""What an audit found: every figure between its floor and its ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mpsl_dist.analysis.audit.scores import Score

#: What ``--fail-over`` may name, and what it measures.
METRICS: dict[str, str] = {
    "psnr": "of pictures and spectrograms, dB",
    "r2": "share of the pixels' variance that is explained",
    "labels": "share of labels that are right",
    "label_auc": "one class against the rest, area under the curve",
    "label_counts": "share of a mini-batch's label counts that are right",
    "words": "share of words that are right",
    "reidentified": "share of samples found among candidates",
    "membership": "area under the curve",
}


@dataclass(frozen=True)
class Figure:
    """One attack's success.

    Attributes
    ----------
    step : int
        Steps that the run had done.
    attack, knowledge, of : str
        How; what the attacker knows of the client's weights; of which modality or message.
    metric : str
        A key of :data:`METRICS`.
    value, error : float
        And its standard error.
    floor, ceiling : float
        What knows nothing, and what knows all.
    samples : int
    """

    step: int
    attack: str
    knowledge: str
    of: str
    metric: str
    value: float
    error: float
    floor: float
    ceiling: float
    samples: int

    @classmethod
    def found(
        cls,
        step: int,
        attack: tuple[str, str, str],
        metric: str,
        score: Score,
        floor: float,
        samples: int,
        ceiling: float = 1.0,
    ) -> Figure:
        """Return a figure; ``attack`` is how, with what knowledge, of what."""
        limits = (float(floor), ceiling, samples)
        return cls(step, *attack, metric, score.value, score.error, *limits)

    @property
    def control(self) -> bool:
        """Whether this is no attack: it must find nothing."""
        return self.attack.startswith("control")


@dataclass(frozen=True)
class Equations:
    """What the weights say before anything was sent, see :func:`pictures.exactness`.

    Attributes
    ----------
    deficit : int
        Numbers that the equations leave open.
    """

    step: int
    of: str
    pixels: int
    width: int
    stride: int
    pre_norm: bool
    deficit: int
    condition: float


@dataclass(frozen=True)
class Gallery:
    """Some samples of a modality, as they are and as the attacks give them back, 0 to 1.

    Attributes
    ----------
    rows : dict of str to Tensor
        Name -> (n, c, h, w).
    """

    of: str
    step: int
    rows: Mapping[str, Tensor]


@dataclass
class Audit:
    """All that was found of one run or configuration.

    Attributes
    ----------
    name, method, source : str
        The experiment's, and where it was read.
    settings : dict
        The resolved experiment.
    summary : dict
        The run's ``summary.json``; empty without a run.
    samples, public : int
        That were attacked, and that the attacker had.
    notes : list of str
        What could not be attacked, and why.
    """

    name: str
    method: str
    source: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    samples: int
    public: int
    figures: list[Figure] = field(default_factory=list)
    equations: list[Equations] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def strongest(self, metric: str, step: int | None = None) -> Figure | None:
        """Return the attack that did best by a metric, at a step or at any."""
        rivals = [f for f in self.figures if f.metric == metric and not f.control]
        rivals = [f for f in rivals if step is None or f.step == step]
        return max(rivals, key=lambda f: f.value, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps that were audited, ascending."""
        return sorted({f.step for f in self.figures})

    def as_json(self) -> dict[str, Any]:
        """Return all but the pictures."""
        return {
            "name": self.name,
            "method": self.method,
            "source": self.source,
            "samples": self.samples,
            "public_samples": self.public,
            "data": "halves of the run's test data, which share no picture and no sound",
            "figures": [asdict(f) for f in self.figures],
            "strongest": {
                str(step): {
                    metric: asdict(best)
                    for metric in METRICS
                    if (best := self.strongest(metric, step))
                }
                for step in self.steps
            },
            "equations": [asdict(e) for e in self.equations],
            "notes": self.notes,
            "experiment": self.settings,
        }


def over(audits: Sequence[Audit], limits: Mapping[str, float]) -> list[str]:
    """Return a line for every figure above its limit, or no number; controls have no limit."""
    return [
        f"{audit.name}, step {f.step}: {f.metric} {f.value:.4g} is "
        f"{'no number, so not known to be below' if math.isnan(f.value) else 'over'} "
        f"{limits[f.metric]:g} ({f.attack}, {f.of}, knowledge {f.knowledge})"
        for audit in audits
        for f in audit.figures
        if f.metric in limits and not f.control and not f.value <= limits[f.metric]
    ]
