"""A retrieval model's test set in the plane: figure 4 of the paper.

Shape legend: ``n`` pictures, ``c`` captions of each, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.actors.local_data import TestData
from mpsl_dist.errors import UserError

#: Test samples that are embedded.
_SAMPLES = 300


class Unavailable(ValueError):
    """A run whose model or data are not here; the message says which."""


def plane(folder: Path) -> tuple[Mapping[str, NDArray[np.floating]], float]:
    """Return a run's embeddings of its first test samples, on their first two principal axes.

    Parameters
    ----------
    folder : Path
        The run directory of a retrieval run.

    Returns
    -------
    mapping of str to array
        ``pictures`` (n, 2) and ``captions`` (n * c, 2).
    float
        The part of the variance that the two axes hold.

    Raises
    ------
    Unavailable
        If there is no model, or its test set cannot be read.
    """
    from sklearn.decomposition import PCA

    if not (folder / "model" / "config.json").is_file():
        raise Unavailable(f"{folder}: no model/ there")
    try:
        model, experiment, _ = deployable.load(folder / "model")
        test = load_data(experiment).test
    except UserError as error:
        raise Unavailable(str(error).splitlines()[0]) from error
    found, seen = [], 0
    with torch.no_grad():
        for batch in TestData(test).batches(experiment.training.test_batch_size):
            found.append(model(model.to_own(batch.inputs), batch.present).cpu())
            seen += len(batch)
            if seen >= _SAMPLES:
                break
    embedded_nmd = torch.cat(found)[:_SAMPLES].float()
    embedded_nmd = torch.nn.functional.normalize(embedded_nmd, dim=-1)
    images_nd, texts_nd = embedded_nmd[:, 0], embedded_nmd[:, 1:].flatten(0, 1)
    fitted = PCA(2, random_state=0).fit(torch.cat([images_nd, texts_nd]).numpy())
    points = {
        "pictures": fitted.transform(images_nd.numpy()),
        "captions": fitted.transform(texts_nd.numpy()),
    }
    return points, float(fitted.explained_variance_ratio_.sum())
