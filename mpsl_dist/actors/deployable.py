"""One deployable model, [F_C; F_S] of section 3.3: loads and predicts without any RPC."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpsl_dist.actors.assembly import build_server_model, build_tokenizers
from mpsl_dist.actors.choices import device_of, task_of
from mpsl_dist.config import Experiment, Weights, from_dict, to_dict
from mpsl_dist.data import Dataset, Splits, load_batches
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.models.tasks import Task, Tested
from mpsl_dist.models.tokenizers import Tokenizers, fuse


class Deployable(nn.Module):
    """Tokenizers, encoder and head in one module.

    Parameters
    ----------
    tokenizers : Tokenizers
    server_model : ServerModel
    task : Task
    """

    def __init__(self, tokenizers: Tokenizers, server_model: ServerModel, task: Task) -> None:
        super().__init__()
        self.tokenizers = tokenizers
        self.server_model = server_model
        self.task = task

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give logits (b, classes), or embeddings (b, 2, d), for inputs as in a ``Batch``."""
        return self.server_model(fuse(self.tokenizers(inputs), self.server_model.fusion))

    def to_own(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs on the model's device, and in its precision."""
        like = next(self.parameters())
        return {
            name: x.to(like.device, like.dtype if x.is_floating_point() else None)
            for name, x in inputs.items()
        }

    def test(self, dataset: Dataset, batch_size: int) -> dict[str, float]:
        """Return the task's metrics over a whole split: ``accuracy``, or recalls."""
        return self.task.metrics(self._predict(dataset, range(len(dataset.labels)), batch_size))

    def right(self, dataset: Dataset, positions: Sequence[int], batch_size: int) -> int:
        """Return how many of these samples are predicted right."""
        tested = self._predict(dataset, positions, batch_size)
        return sum(self.task.score(predictions, labels_b) for predictions, labels_b in tested)

    def _predict(
        self, dataset: Dataset, positions: Sequence[int], batch_size: int
    ) -> Iterator[Tested]:
        batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
        for batch in load_batches(dataset, batches, seed=None):
            with torch.no_grad():
                predictions = self(self.to_own(batch.inputs)).cpu()
            yield predictions, batch.labels

    def save(self, folder: Path, experiment: Experiment, splits: Splits) -> None:
        """Write ``model.safetensors`` and ``config.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        partial = folder / "model.safetensors.partial"
        save_file(state, partial)
        partial.replace(folder / "model.safetensors")
        description = {
            "experiment": to_dict(experiment),
            "shapes": {name: list(shape) for name, shape in splits.shapes.items()},
            "classes": list(splits.classes),
        }
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", "utf-8")


def build(experiment: Experiment, splits: Splits) -> Deployable:
    """Build the whole model here, with the initial weights that its owners would begin with."""
    tokenizers = build_tokenizers(experiment, splits)
    model = build_server_model(experiment, splits, tokenizers.lengths)
    return Deployable(tokenizers, model, task_of(splits)).to(device_of(experiment))


def load(folder: str | Path) -> tuple[Deployable, Experiment, tuple[str, ...]]:
    """Load what :meth:`Deployable.save` wrote.

    Returns
    -------
    model, experiment, classes
        The model in evaluation mode, on the experiment's device.
    """
    folder = Path(folder)
    description: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    # Every weight is in the folder: where the first ones came from matters no more.
    experiment = replace(from_dict(description["experiment"]), weights=Weights())
    shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
    splits = Splits(_NOTHING, _NOTHING, shapes, tuple(description["classes"]))
    model = build(experiment, splits)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), experiment, splits.classes


class _Nothing:
    """The absent splits of a model that is only used."""

    labels = torch.empty(0, dtype=torch.long)

    def fetch(self, indices: Any, seed: int | None = None) -> Any:
        raise AssertionError("a deployed model has no data")


_NOTHING = _Nothing()
