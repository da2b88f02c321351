"""Every dataset that is read from files, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mpsl_dist.data import image_text, manifest, mnist_fsdd, retrieval, video_audio
from mpsl_dist.data.dataset import Splits
from mpsl_dist.errors import DataError

DATASETS: dict[str, Callable[..., Splits]] = {
    "coco-qa": image_text.load_coco_qa,
    "t4sa": image_text.load_t4sa,
    "kinetics-sounds": video_audio.load_kinetics_sounds,
    "ucf101": video_audio.load_ucf101,
    "meld": video_audio.load_meld,
    "flickr8k": partial(retrieval.load_flickr30k, folder="flickr8k"),
    "flickr30k": retrieval.load_flickr30k,
    "ms-coco": retrieval.load_ms_coco,
    "manifest": manifest.load,
    "mnist-fsdd": mnist_fsdd.load,
}


def load(name: str, root: str | Path | None, text_length: int = 77, **options: Any) -> Splits:
    """Load a dataset that is read from files.

    Parameters
    ----------
    text_length : int
        Byte-pair tokens of a text; of no effect where there are no texts.
    options
        ``image_size``, ``audio_frames``, ``modalities``, ``on_error`` and ``cache``; None leaves
        the dataset's own default.

    Raises
    ------
    DataError
        Also if an option is given that the dataset has no use for.
    """
    load_one = DATASETS[name]
    known = inspect.signature(load_one).parameters
    given = {option: value for option, value in options.items() if value is not None}
    useless = sorted(given.keys() - known.keys())
    if useless:
        raise DataError("\n".join(f"data.{option}: {name} has no use for it" for option in useless))
    if "text_length" in known:
        given["text_length"] = text_length
    return load_one(root, **given)
