"""ML-ECS' captions: what ought to be written, what is, and how near it comes (Rouge-L).

rouge-score is the extra ``mpsl_dist[captions]``; it needs no file but its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from mpsl_dist.actors.local_data import TestData
from mpsl_dist.data import Batch
from mpsl_dist.errors import ConfigError, DiskError
from mpsl_dist.models.answers import Answers, CaptionAnswers
from mpsl_dist.models.unified import Unified
from mpsl_dist.records.run_directory import write_atomic

#: The server's file in a run directory.
FILE = "captions.jsonl"


@dataclass(frozen=True)
class Written:
    """A caption that a model wrote.

    Attributes
    ----------
    picture : int
        Its number in the test split.
    written : str
    references : tuple of str
        The captions that it has.
    rouge_l : float
    """

    picture: int
    written: str
    references: tuple[str, ...]
    rouge_l: float


def wanted(answers: Answers, batch: Batch) -> Tensor:
    """Return what ought to be answered of a training batch: labels (b,), or tokens (b, p)."""
    if isinstance(answers, CaptionAnswers):
        assert batch.captions is not None
        return answers.tokens([own[0] for own in batch.captions])
    return batch.labels


def captions_of(model: Unified, tests: TestData, batch_size: int) -> Iterator[Written]:
    """Yield what a model writes of the test samples that can be read, with its score."""
    score = rouge_l()
    for batch in filter(len, tests.batches(batch_size)):
        assert batch.captions is not None
        told = zip(batch.labels.tolist(), model.write(batch.inputs), batch.captions, strict=True)
        for picture, written, references in told:
            yield Written(picture, written, references, score(references, written))


def mean_score(captions: Sequence[Written]) -> tuple[dict[str, float], int]:
    """Return captions' mean score as ``rouge_l``, and how many they are; none of no captions."""
    scores = [one.rouge_l for one in captions]
    return ({"rouge_l": sum(scores) / len(scores)} if scores else {}), len(scores)


def save(captions: Sequence[Written], path: Path) -> None:
    """Write captions, one a line, in the place of those of an earlier test.

    Raises
    ------
    DiskError
        If the file cannot be written.
    """
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in captions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lines)
    except OSError as error:
        raise DiskError.of(path, error) from error


def rouge_l() -> Callable[[Sequence[str], str], float]:
    """Return a function of (references, written): the F-measure of Rouge-L, 0 to 1.

    It is that of the reference that comes nearest, as the package has it: captions of a picture say
    different things of it, and to say one of them is right. Of texts of one line Rouge-LSum, the
    paper's, is the same number.

    Raises
    ------
    ConfigError
        If rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "mlecs.answer: caption needs the package rouge-score, which is not installed here; "
            "pip install 'mpsl_dist[captions]' (docs/mlecs.md)"
        ) from error
    scorer = RougeScorer(["rougeL"])
    return lambda references, written: float(
        scorer.score_multi(references, written)["rougeL"].fmeasure
    )
