"""The whole model in one hand: what centralized training and a client of FedAvg step.

It sees raw samples and labels, so it lives where they are allowed to be: in the one process of a
centralized run, or at the client that owns them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.optimizer import Stepper
from mpsl_dist.config import Training
from mpsl_dist.data import Batch
from mpsl_dist.errors import DivergedError
from mpsl_dist.models.tasks import Task


class Learner:
    """A whole model, one optimizer for the tokenizers and one for the server's part.

    The two optimizers have the settings that the two owners have in split learning.

    Parameters
    ----------
    model : Deployable
        Trained in place; several learners may take turns on one.
    training : Training
    """

    def __init__(self, model: Deployable, training: Training) -> None:
        self.model = model
        self.task: Task = model.task
        self.steppers = {
            "tokenizers": Stepper(model.tokenizers.parameters(), training.client),
            "server_model": Stepper(model.server_model.parameters(), training.server),
        }
        self.parameters = [p for s in self.steppers.values() for p in s.parameters]

    def plan(self, steps_per_epoch: int, epochs: int) -> None:
        """Set what the schedules span; before the first step."""
        for stepper in self.steppers.values():
            stepper.plan(steps_per_epoch, epochs)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss over these samples (Eq. 2), a scalar."""
        predictions = self.model(self.model.to_own(batch.inputs), batch.present)
        return self.task.loss(predictions, batch.labels)

    def gradients(self, loss: Tensor) -> dict[Tensor, Tensor]:
        """Return a loss's gradients by parameter, without parameters that had no part in it."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = zip(self.parameters, found, strict=True)
        return {parameter: gradient for parameter, gradient in pairs if gradient is not None}

    def train(self, batch: Batch, step: int) -> float:
        """Train one step at the rate of the run's step ``step``, and return the loss before it.

        Raises
        ------
        DivergedError
            If the loss is no finite number; no parameter has moved then.
        """
        loss = self.loss(batch)
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"the loss is {loss.item()}; no parameter was changed by this step. "
                "Lower training.server.lr and training.client.lr"
            )
        gradients = self.gradients(loss)
        for stepper in self.steppers.values():
            stepper.step(gradients, step)
        return loss.item()

    def optimizer_state(self) -> dict[str, Any]:
        """Return both optimizers' state."""
        return {name: stepper.state() for name, stepper in self.steppers.items()}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`optimizer_state`."""
        for name, stepper in self.steppers.items():
            stepper.load(state[name])
