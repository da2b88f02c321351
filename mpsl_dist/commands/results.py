"""What is asked of runs that are there: test, comparison, report, what they give away."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mpsl_dist.errors import ConfigError


def add_to(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate``, ``compare``, ``report`` and ``audit`` to the command line."""
    evaluate = commands.add_parser("evaluate", help="test the model that a run left, without RPC")
    evaluate.add_argument(
        "run_directory",
        metavar="RUN",
        help="a run directory, runs/<name>; or a client's own model, runs/<name>/model/client-0000",
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="where the data lies and how to compute; the model stays as it was trained",
    )
    evaluate.set_defaults(run=_evaluate)
    compare = commands.add_parser("compare", help="methods beside each other, from their runs")
    compare.add_argument("runs", nargs="+", metavar="RUN_DIR", help="completed run directories")
    compare.add_argument("--out", metavar="FILE.md", help="write page, csv and picture")
    compare.set_defaults(run=_compare)
    _add_report(commands)
    _add_audit(commands)


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="one page to show around, and markdown, of runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, runs/<name>")
    where = "a folder for report.html, report.md and pictures/"
    report.add_argument("--out", metavar="DIR", required=True, help=where)
    report.add_argument("--overwrite", action="store_true", help="replace an earlier report there")
    report.set_defaults(run=_report)


def _add_audit(commands: argparse._SubParsersAction) -> None:
    audit = commands.add_parser("audit", help="what a curious server learns from what it receives")
    what = "run directories and experiments; key.path=value as for evaluate or train"
    audit.add_argument("targets", nargs="+", metavar="RUN_OR_CONFIG", help=what)
    samples = "test samples that are attacked: 200"
    audit.add_argument("--samples", type=int, default=200, metavar="N", help=samples)
    out = "default: audit-NAME, of several audit-sweep"
    audit.add_argument("--out", metavar="DIR", help=out)
    audit.add_argument("--overwrite", action="store_true", help="replace an earlier audit there")
    over = "exit with 1 if an attack finds more"
    audit.add_argument("--fail-over", nargs="+", default=[], metavar="psnr=20", help=over)
    audit.set_defaults(overrides=[], run=_audit)


def _evaluate(options: argparse.Namespace) -> int:
    from mpsl_dist.actors import deployable
    from mpsl_dist.actors.agreement import renumbered
    from mpsl_dist.actors.holdings import Holdings, load_data, loaders_of
    from mpsl_dist.actors.local_data import TestData
    from mpsl_dist.actors.model_folder import find
    from mpsl_dist.config.methods import facts_of

    folder = find(options.run_directory)
    model, experiment, classes = deployable.load(folder, options.overrides)
    place = (experiment.data.place, experiment.data.test_at)
    needs = ("test",) if place == ("own", "server") else ("train", "test")
    splits = renumbered(load_data(experiment, needs), classes)
    # What its clients lack says nothing of a server's own model.
    if experiment.data.missing.rate and facts_of(experiment).common:
        splits = Holdings.deal(experiment, splits).splits
    print(f"the test set of {experiment.data.name}:")
    held = TestData(splits.test, loaders=loaders_of(experiment, splits))
    results = model.test(held, experiment.training.test_batch_size)
    if held.unread.positions:
        print(f"left out, as they cannot be read: {len(held.unread.positions)} of {len(held)}")
    for name, value in results.items():
        print(f"{name} {value:.4f}")
    for name, value in splits.baselines.items():
        print(f"{name} {value:.4f}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis import compare

    if options.out and Path(options.out).suffix != ".md":
        raise ConfigError(f"--out: {options.out} must end in .md")
    groups = compare.group(compare.read(options.runs))
    print(compare.markdown(groups))
    for path in compare.write(groups, Path(options.out)) if options.out else ():
        print(f"wrote {path}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis.report import page

    for path in page.write(options.runs, Path(options.out), options.overwrite):
        print(f"wrote {path}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    from mpsl_dist.analysis.audit.audit import audit_all, limits_of

    limits, targets = limits_of(options.fail_over), [*options.targets, *options.overrides]
    over = audit_all(targets, options.samples, options.out, options.overwrite, limits)
    print("\n".join(over), file=sys.stderr, end="\n" if over else "")
    return int(bool(over))
