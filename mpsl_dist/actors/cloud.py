"""ML-ECS' server: the public data, a large model of all modalities, and one as small as a device's.

Shape legend: ``v`` public samples, ``b`` batch, ``s`` the fused width, ``m`` modalities, ``h`` the
width that modalities share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsl_dist.actors.captions import Written, captions_of, mean_score, wanted
from mpsl_dist.actors.edge_device import dropout_of, step_on, tested
from mpsl_dist.actors.local_data import LocalData, TestData
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.actors.stream import Stream
from mpsl_dist.config.mlecs import Mlecs
from mpsl_dist.config.schema import Optimizer
from mpsl_dist.data import Batch
from mpsl_dist.errors import DataError
from mpsl_dist.models.answers import CaptionAnswers, answer_loss
from mpsl_dist.models.average import load_trainable, trainable_state
from mpsl_dist.models.lora import over
from mpsl_dist.models.transfer import pooled_kl
from mpsl_dist.models.unified import Unified, load_shared, shared_state
from mpsl_dist.records import state


class Cloud:
    """The server.

    Parameters
    ----------
    public : LocalData
        The public samples, of all modalities; may be empty, and then nothing is trained here.
    everything, tests : TestData
        The public samples in their order, and the server's test samples.
    large, small : Unified
        Of ``small`` the language model is the devices', with the soft-prompt generator of its own;
        it reads the fused representation of ``large``. If it has a proxy, the proxy does in its
        place, and ``small`` rests.
    rules : Mlecs
    settings : Optimizer
    batch_size, rounds, seed : int
        As of :class:`mpsl_dist.actors.edge_device.EdgeDevice`.
    test_batch_size : int
        Samples of a batch without gradients.
    owner : int
        Its number among those who draw dropout: how many devices there are.
    """

    def __init__(
        self,
        public: LocalData,
        everything: TestData,
        tests: TestData,
        large: Unified,
        small: Unified,
        rules: Mlecs,
        settings: Optimizer,
        batch_size: int,
        rounds: int,
        seed: int,
        test_batch_size: int,
        owner: int,
    ) -> None:
        self.everything = everything
        self.tests = tests
        self.large = large.eval()
        self.small = small.eval()
        self.rules = rules
        self.seed = seed
        self.owner = owner
        self.test_batch_size = test_batch_size
        self.public = Stream(public, batch_size) if rules.server_steps else None
        #: What learns from the large model, and the large one from it.
        self.student = small.proxy or small
        tuned = [*self.student.answers.parameters(), *self.student.generator.parameters()]
        self.large_stepper = Stepper(large.parameters(), settings)
        self.small_stepper = Stepper(tuned, settings)
        for stepper in (self.large_stepper, self.small_stepper):
            stepper.plan(max(1, rules.server_steps), rounds)
        #: φ: what every device begins its next round with.
        self.shared: dict[str, Tensor] = shared_state(small, rules.exchange)
        #: How far the averages of A and B apart were from the average of their products.
        self.gap = 0.0
        #: What the large model wrote of its test samples, at its last test.
        self.captions: list[Written] = []

    @torch.no_grad()
    def fused_table(self) -> Tensor:
        """Return the fused representations (v, s) of all public samples (Eq. 9).

        Raises
        ------
        DataError
            If a public sample cannot be read: devices count on every row.
        """
        found = [
            self.large.read(self.large.encode(batch.inputs)).fused_bs
            for batch in self.everything.batches(self.test_batch_size)
        ]
        table_vs = torch.cat(found).cpu()
        if len(table_vs) != len(self.everything):
            raise DataError("data.public_fraction: a public sample cannot be read; see rank0.log")
        return table_vs

    def enhance(self, round_: int, averaged: Mapping[str, Tensor]) -> None:
        """Take in the devices' average, train both models on the public samples, and keep φ.

        Small and large model learn from each other (Eq. 15, 16); without transfer the small one
        rests, and φ is the average.

        Raises
        ------
        DivergedError
            If a loss is no finite number.
        """
        self.shared = over(self.shared, averaged)
        load_shared(self.small, self.rules.exchange, self.shared)
        if self.public is None:
            return
        with (
            dropout_of(self.large, self.seed, self.owner, round_),
            dropout_of(self.small, self.seed, self.owner + 1, round_),
        ):
            for place, _, batch in self.public.part(round_, self.rules.server_steps):
                self._step(place, batch)
        if self.rules.transfer:
            self.shared = shared_state(self.small, self.rules.exchange)

    def _step(self, place: int, batch: Batch) -> None:
        read = self.large.read(self.large.encode(batch.inputs))
        labels_b = wanted(self.large.answers, batch).to(read.fused_bs.device)
        large_bpv = self.large.answers(self.large.prompt(read.fused_bs), labels_b)
        loss = answer_loss(self.large.answers, large_bpv, labels_b)
        if self.rules.contrast:
            loss = loss + self._contrast(place, read.modalities_bmh)
        if self.rules.transfer:
            soft_bld = self.student.prompt(read.fused_bs.detach())
            small_bpv = self.student.answers(soft_bld, labels_b)
            learned = answer_loss(self.student.answers, small_bpv, labels_b)
            learned = learned + pooled_kl(small_bpv, large_bpv, self.rules.pool)
            loss = loss + pooled_kl(large_bpv, small_bpv, self.rules.pool)
            step_on(learned, self.small_stepper, place)
        step_on(loss, self.large_stepper, place)

    def _contrast(self, place: int, modalities_bmh: Tensor) -> Tensor:
        """Return the contrast of one modality, drawn for the step, with all others."""
        count = modalities_bmh.shape[1]
        drawn = int(np.random.default_rng([self.seed, place, 4]).integers(count))
        others = [m for m in range(count) if m != drawn]
        return self.large.contrast(modalities_bmh[:, drawn], modalities_bmh[:, others])

    def test(self) -> tuple[dict[str, float], int]:
        """Return the large model's scores on its test samples, and of how many, as ``tested``.

        What it writes of them is kept.
        """
        if isinstance(self.large.answers, CaptionAnswers):
            self.captions = [*captions_of(self.large, self.tests, self.test_batch_size)]
            return mean_score(self.captions)
        return tested(self.large, self.tests, self.test_batch_size)

    def trained(self) -> int:
        """Return how many numbers it trains."""
        return sum(p.numel() for s in self._steppers().values() for p in s.parameters)

    def save(self, path: Path) -> str:
        """Write both models, their optimizers and φ; return the file's SHA-256."""
        kept = {
            "large": trainable_state(self.large),
            "small": trainable_state(self.small),
            "shared": self.shared,
            "gap": self.gap,
            "optimizers": {name: stepper.state() for name, stepper in self._steppers().items()},
        }
        return state.save(path, kept)

    def restore(self, path: Path) -> None:
        """Continue from :meth:`save`."""
        with state.continuing(path) as kept:
            load_trainable(self.large, kept["large"])
            load_trainable(self.small, kept["small"])
            self.shared = dict(kept["shared"])
            self.gap = kept["gap"]
            for name, stepper in self._steppers().items():
                stepper.load(kept["optimizers"][name])

    def _steppers(self) -> dict[str, Stepper]:
        """Return those that step: without transfer the small model rests."""
        found = {"large": self.large_stepper}
        return found | {"small": self.small_stepper} if self.rules.transfer else found
