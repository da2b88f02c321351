"""What is done with a trained model: predict with it, hand it on."""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mpsl_dist.commands.ending import say
from mpsl_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mpsl_dist.actors.predictor import Predictor
    from mpsl_dist.data.decode.samples import Sample
    from mpsl_dist.data.sets.manifest_table import Row

#: What a sample is made of; each may be given several times, for several samples.
_PARTS = ("image", "audio", "video", "text")
#: Columns that are added to a table of a classifier, of a retrieval model, and to every table.
_ADDED = {"classification": ("prediction", "probability"), "retrieval": ("similarity",)}
_FAULT = "error"
#: Classes shown of a single sample.
_SHOWN = 5


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``predict`` and ``export`` to the command line."""
    predict = commands.add_parser("predict", help="classes of files, or how well they fit")
    _add_model(predict)
    words = "where and how to compute: device=cpu"
    predict.add_argument("overrides", nargs="*", metavar="key.path=value", help=words)
    for part in _PARTS:
        metavar = "TEXT" if part == "text" else "FILE"
        predict.add_argument(f"--{part}", action="append", metavar=metavar)
    table = "samples by row, csv or jsonl; columns image, audio, video and text"
    predict.add_argument("--csv", metavar="FILE", help=table)
    predict.add_argument("--out", metavar="FILE.csv", help="of --csv; default: standard output")
    predict.add_argument("--overwrite", action="store_true", help="replace an earlier --out")
    predict.set_defaults(run=_predict)
    export = commands.add_parser("export", help="write a folder that a model hub takes as it is")
    _add_model(export)
    export.add_argument("--to", required=True, metavar="FOLDER")
    licence = "of the model, as the hub names it: apache-2.0; default: unknown"
    export.add_argument("--license", default="unknown", metavar="NAME", help=licence)
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(run=_export)


def _add_model(parser: argparse.ArgumentParser) -> None:
    what = "a run directory, its model/ or an exported folder"
    parser.add_argument("model", metavar="MODEL", help=what)
    client = "with this client's own part, or its own model, not the average of all"
    parser.add_argument("--client", type=int, metavar="K", help=client)


def _export(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis import model_card

    for path in model_card.export(
        options.model, Path(options.to), options.client, options.license, options.overwrite
    ):
        print(f"wrote {path}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from mpsl_dist.actors import predictor

    given = {part: found for part in _PARTS if (found := getattr(options, part))}
    if bool(given) == bool(options.csv):
        parts = ", ".join(f"--{part}" for part in _PARTS)
        raise ConfigError(f"give either {parts}, or --csv with a table of them")
    if options.out and not options.csv:
        raise ConfigError("--out: only of --csv; what else is predicted is printed")
    model = predictor.load(options.model, *options.overrides, client=options.client)
    if options.csv:
        out = Path(options.out) if options.out else None
        return _predict_table(model, Path(options.csv), out, options.overwrite)
    if model.model.task.name == "retrieval":
        _show_similarity(model, given)
    else:
        _show_classes(model, given)
    return 0


def _show_classes(model: Predictor, given: Mapping[str, list[str]]) -> None:
    found = model.predict(**{part: one[0] if len(one) == 1 else one for part, one in given.items()})
    if model.reader.gaps != "none":
        there = model.reader.there(given)
        whose = " alone" if len(there) == 1 else " together"
        print(f"from {' and '.join(there)}{whose}:", file=sys.stderr)
    if not isinstance(found, list):
        best = sorted(found.probabilities.items(), key=lambda named: -named[1])
        for name, probability in best[:_SHOWN]:
            print(f"{name} {probability:.4f}")
        return
    for number, one in enumerate(found):
        several = (given[part][number] for part in given if len(given[part]) > 1)
        print(f"{one.label} {one.probability:.4f}  {'  '.join(several)}")


def _show_similarity(model: Predictor, given: Mapping[str, list[str]]) -> None:
    similar_nm = model.similarity(**given)
    first, second = (given[name] for name in model.modalities)
    for name, row in zip(first, similar_nm.tolist(), strict=True):
        for value, other in sorted(zip(row, second, strict=True), reverse=True):
            print(f"{value:.4f}  {name}  {other}")


# -- tables ----------------------------------------------------------------------------------------


def _predict_table(model: Predictor, path: Path, out: Path | None, overwrite: bool) -> int:
    """Write a table with the predictions beside its rows; return the exit status."""
    from mpsl_dist.data.sets import manifest_table

    if out and out.exists() and not overwrite:
        raise ConfigError(f"--out: {out} exists; replace it with --overwrite, or name another")
    if out and out.exists() and out.samefile(path):
        raise ConfigError(f"--out: {out} is the table itself; name another")
    header, rows = manifest_table.read_unlabelled(path)
    _check_columns(model, path, header)
    added = (*_ADDED[model.model.task.name], _FAULT)
    wrong = count = 0
    with _opened(out) as file:
        writer = csv.DictWriter(file, [*header, *added], restval="", extrasaction="ignore")
        writer.writeheader()
        while some := list(islice(rows, model.batch_size)):
            for row, result in zip(some, _results(model, some), strict=True):
                writer.writerow(row.cells | result)
                count += 1
                if _FAULT in result:
                    wrong += 1
                    say("\n".join(f"{path}: line {row.line}: {result[_FAULT]}".splitlines()))
    if wrong:
        say(f"{path}: {wrong} of {count} rows could not be predicted")
    return 2 if wrong else 0


def _check_columns(model: Predictor, path: Path, header: Sequence[str]) -> None:
    """Refuse a table that lacks what the model needs; name what it does not look at."""
    mine = [name for name in (*_ADDED[model.model.task.name], _FAULT) if name in header]
    if mine:
        raise DataError(f"{path}: has a column '{mine[0]}' already; name it otherwise")
    there = {name: "" for name in _PARTS if name in header}
    used = _used(model, there)
    try:
        model.reader.check(used, columns=True)
    except DataError as error:
        raise DataError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error
    for name in there.keys() - used.keys():
        takes = " and ".join(model.modalities)
        print(f"{path}: the column '{name}' is not used: the model takes {takes}", file=sys.stderr)


def _results(model: Predictor, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the columns that are added to each of these rows, computed as one batch."""
    results: list[dict[str, Any]] = []
    read = []
    for row in rows:
        try:
            if row.fault:
                raise DataError(row.fault)
            things = _used(model, _things(model, row.sample))
            model.reader.check(things)
            read.append(model.reader.read(things))
            results.append({})
        except DataError as error:
            results.append({_FAULT: "; ".join(str(error).splitlines())})
    good = [result for result in results if not result]
    if not good:
        return results
    if model.model.task.name == "retrieval":
        for result, value in zip(good, model.fitting(read), strict=True):
            result["similarity"] = value
    else:
        for result, one in zip(good, model.classified(read), strict=True):
            result |= {"prediction": one.label, "probability": one.probability}
    return results


def _things(model: Predictor, sample: Sample) -> dict[str, Any]:
    import torch

    things = {part: value for part in _PARTS if (value := getattr(sample, part)) is not None}
    if sample.silent and "audio" in model.modalities:
        things["audio"] = torch.zeros(model.reader.shapes["audio"])
    return things


def _used(model: Predictor, things: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model looks at of a row."""
    wanted = [name for name in ("image", "audio") if name in model.modalities]
    clip = any(name not in things for name in wanted)
    return {
        name: thing
        for name, thing in things.items()
        if name in model.modalities or (name == "video" and clip)
    }


@contextlib.contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Open a table that is there only once it is whole; standard output where there is none."""
    if out is None:
        yield sys.stdout
        return
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            yield file
        partial.replace(out)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--out: {out} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
