"""Score captions that a run has left: Rouge-L, and BERTScore with a model of your own.

    python launch/score_captions.py runs/captions/captions.jsonl --bert FOLDER --layers 9

Beside every score stands what the same captions get as those of the next picture: what is left then
is owed to how captions are written, and not to what the picture shows. FOLDER holds a model and its
tokenizer as transformers saves them; nothing is fetched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # works from a checkout that is not installed

from mpsl_dist.actors.captions import rouge_l  # noqa: E402
from mpsl_dist.errors import UserError, WeightsError  # noqa: E402
from mpsl_dist.reading import read_json_lines  # noqa: E402

#: Captions written, and the references of each -> a score of each.
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]


def main(words: Sequence[str]) -> int:
    """Print the scores and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="captions.jsonl of a run")
    parser.add_argument("--bert", type=Path, help="the folder of a BERT")
    parser.add_argument("--layers", type=int, default=9, help="of which layer vectors are taken")
    options = parser.parse_args(words)
    try:
        lines, _ = read_json_lines(options.file)
        scores: dict[str, Score] = {"rouge_l": _rouge_l}
        if options.bert:
            scores["bertscore"] = bertscore(options.bert, options.layers)
        written = [line["written"] for line in lines]
        references = [line["references"] for line in lines]
        print(f"{len(lines)} captions")
        for name, score in scores.items():
            own, other = score(written, references), score(written, _turned(references))
            print(f"{name}: {fmean(own):.4f}; of the next picture: {fmean(other):.4f}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _turned(references: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return [*references[1:], *references[:1]]


def _rouge_l(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    score = rouge_l()
    return [score(own, told) for own, told in zip(references, written, strict=True)]


def bertscore(folder: Path, layers: int) -> Score:
    """Return BERTScore's F-measure by the model in a folder, of the nearest reference.

    Raises
    ------
    UserError
        If bert-score is not installed, or no model lies there.
    """
    if not (folder / "config.json").is_file():
        raise WeightsError(f"--bert: {folder} holds no model; it has no config.json")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from bert_score import score
    except ImportError as error:
        raise WeightsError(
            "--bert: needs the package bert-score, which is not installed here; pip install "
            f"bert-score ({error})"
        ) from error

    def measured(written: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        found = score(
            [*written], [[*own] for own in references], model_type=str(folder), num_layers=layers
        )
        return found[2].tolist()

    return measured


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
