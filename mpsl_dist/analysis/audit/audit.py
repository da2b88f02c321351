"""``mpsl_dist audit``: an honest but curious server attacks the messages that its clients make."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from mpsl_dist import config
from mpsl_dist.actors.defences import secret_file, secrets_of
from mpsl_dist.analysis.audit import halves, report
from mpsl_dist.analysis.audit.attacks import Scene, attack_labels, attack_samples
from mpsl_dist.analysis.audit.figures import METRICS, Audit, over
from mpsl_dist.analysis.audit.reconstruction import attack_inputs
from mpsl_dist.analysis.audit.victim import Victim, refuse
from mpsl_dist.config import Experiment
from mpsl_dist.config.loading import override
from mpsl_dist.errors import ConfigError, RunError
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.records import checkpoint
from mpsl_dist.records.run_directory import RunDirectory
from mpsl_dist.runtime.answers import name_clients

#: Told what is being done.
Tell = Callable[[str], object]


def limits_of(words: Sequence[str]) -> dict[str, float]:
    """Return ``--fail-over psnr=20`` as a mapping.

    Raises
    ------
    ConfigError
        Naming every word that is no metric with a number.
    """
    found, wrong = {}, []
    for word in words:
        metric, _, number = word.partition("=")
        try:
            found[metric] = float(number)
            if math.isnan(found[metric]):
                raise ValueError(number)
        except ValueError:
            wrong.append(f"--fail-over: {word}: no number after '='")
        if metric not in METRICS:
            wrong.append(f"--fail-over: no metric '{metric}'; there are {', '.join(METRICS)}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def open_targets(targets: Sequence[str]) -> list[tuple[str, Experiment, RunDirectory | None]]:
    """Return the experiments of runs and configurations, and their runs, all mistakes at once.

    Parameters
    ----------
    targets : sequence of str
        Run directories, files of experiments, and ``key.path=value``, which holds for all.

    Raises
    ------
    ConfigError, RunError
        If one is neither, or its method sends no activations.
    """
    overrides = [word for word in targets if "=" in word and not Path(word).exists()]
    found, wrong = [], []
    for word in targets:
        if word in overrides:
            continue
        try:
            found.append(_open(word, overrides))
            refuse(found[-1][1])
        except (ConfigError, RunError) as error:
            wrong += [
                line if word in line else f"{word}: {line}" for line in str(error).split("\n")
            ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    if not found:
        raise ConfigError("audit: name at least one run directory or configuration")
    return found


def _open(word: str, overrides: Sequence[str]) -> tuple[str, Experiment, RunDirectory | None]:
    path = Path(word)
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise RunError(f"{word}: no config.yaml there; is it a run directory?")
        run = RunDirectory(path)
        return word, config.from_dict(override(run.config(), overrides)), run
    if not path.is_file():
        raise RunError(f"{word}: no such run directory or configuration")
    return word, config.load(word, overrides), None


def audit(
    experiment: Experiment,
    run: RunDirectory | None = None,
    samples: int = 200,
    source: str = "",
    tell: Tell = lambda text: None,
) -> Audit:
    """Attack an experiment at its first step and, of a run, at every checkpoint.

    Parameters
    ----------
    run : RunDirectory, optional
        Whose checkpoints are attacked too.
    samples : int
        Test samples whose messages are attacked.
    source : str
        Where the experiment was read.
    tell : callable
        Receives what is being done.

    Raises
    ------
    UserError
        If there is nothing to attack, or something cannot be read.
    """
    read = halves.read(experiment, samples)
    with set_aside(experiment, run) as aside:
        victim = Victim(aside, read)
    found = Audit(
        experiment.name,
        experiment.method,
        source,
        config.to_dict(experiment),
        run.summary() if run else {},
        len(read.audited.labels),
        len(read.public.labels),
    )
    if experiment.clients > len(victim.numbers):
        found.note(
            f"of {experiment.clients} clients the first {len(victim.numbers)} are attacked, and "
            "their average stands for everybody's"
        )
    if run and (lacking := _without_secrets(experiment, run, victim.numbers)):
        found.note(lacking)
    for step, folder in _moments(run):
        if folder is not None:
            victim.restore(folder)
        tell(f"{experiment.name}, step {step}: listening")
        scene = _listen(victim, read, found, step)
        for name, attack in _ATTACKS.items():
            tell(f"{experiment.name}, step {step}: {name}")
            attack(scene)
    return found


def audit_all(
    targets: Sequence[str],
    samples: int,
    out: str | None,
    overwrite: bool,
    limits: Mapping[str, float],
) -> list[str]:
    """Audit runs and configurations, show and write what was found.

    Parameters
    ----------
    targets, out, overwrite
        As :func:`open_targets` and :func:`mpsl_dist.analysis.audit.report.free_folder` take them.
    limits : mapping of str to float
        Metric -> what no attack may exceed.

    Returns
    -------
    list of str
        A line for every figure over its limit.

    Raises
    ------
    UserError
        If something cannot be read, attacked or written.
    """
    if samples < 10:
        raise ConfigError(f"--samples: at least 10, not {samples}")
    opened = open_targets(targets)
    folder = report.free_folder(out, [experiment.name for _, experiment, _ in opened], overwrite)
    console, found = Console(), []
    with console.status("") as status:

        def tell(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text, highlight=False)

        for source, experiment, run in opened:
            found.append(audit(experiment, run, samples, source, tell))
    for one in found:
        report.show(one, console)
    if len(found) > 1:
        report.show_groups(report.grouped(found), console)
    for path in report.write(found, folder):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return over(found, limits)


_ATTACKS: dict[str, Callable[[Scene], None]] = {
    "labels": attack_labels,
    "pictures and words": attack_inputs,
    "matching with candidates": attack_samples,
}


@contextmanager
def set_aside(experiment: Experiment, run: RunDirectory | None) -> Iterator[Experiment]:
    """Yield the experiment in a temporary folder, which has the secrets of the run's clients.

    Clients write secrets that they find none of: the audit's own must not lie where the experiment
    will be run, nor those of a run that was moved be looked for where it was.

    Raises
    ------
    RunError
        If the run's secrets cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="mpsl_dist-audit-") as folder:
        # Under its own name, which is in what the draws come from.
        aside = replace(experiment, output=folder)
        if run and (kept := secrets_of(run.path)).is_dir():
            try:
                shutil.copytree(kept, secrets_of(aside.run_directory))
            except OSError as error:
                raise RunError(f"{kept}: cannot be read: {error}") from error
        yield aside


def _without_secrets(
    experiment: Experiment, run: RunDirectory, clients: Sequence[int]
) -> str | None:
    """Say whose secrets the run has not kept, so that the audit drew others; None if it has all."""
    chosen = experiment.defences
    gone = [n for n in clients if not secret_file(run.path, n).is_file()]
    if not chosen.draws or chosen.secret is not None or not gone:
        return None
    return (
        f"{secrets_of(run.path)}: no secret of {name_clients(gone)} there, so the audit drew "
        "others: noise and orders are not the run's, nor are secret tokenizers those that the run "
        "trained with; where clients are simulated, copy a run with its secrets/ folder"
    )


def _moments(run: RunDirectory | None) -> Iterator[tuple[int, Path | None]]:
    """Yield the first step, then every complete checkpoint's, with its folder."""
    yield 0, None
    for folder in checkpoint.complete_ones(run.checkpoints) if run else ():
        yield int(folder.name.rpartition("-")[2]), folder


def _listen(victim: Victim, read: halves.Halves, found: Audit, step: int) -> Scene:
    heard = victim.hear()
    true = {n: client.tokenizers.local_value() for n, client in victim.clients.items()}
    clients = [one.client for one in heard]
    levels: dict[str, Mapping[int, Tokenizers]] = {
        "initial": dict.fromkeys(clients, victim.initial)
    }
    if step:
        mean, own = victim.weights_fetched()
        if mean is not None:
            levels["average"] = dict.fromkeys(clients, mean)
        if set(clients) <= set(own):
            levels["own"] = own
        elif mean is not None and all(_equal(one, mean) for one in true.values()):
            found.note("knowledge own: all clients hold the same weights, so average is own")
        else:
            found.note("knowledge own: not every client sent weights of its own at an evaluation")
    return Scene(step, victim, read, heard, levels, true, found)


def _equal(one: Tokenizers, other: Tokenizers) -> bool:
    mine, others = trainable_state(one), trainable_state(other)
    same = mine.keys() == others.keys()
    return same and all(torch.equal(mine[name], others[name]) for name in mine)
