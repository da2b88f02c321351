"""Where a model lies: in a run directory, which may have one of every client, or by itself."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.errors import ConfigError, RunError
from mpsl_dist.records import checkpoint, state
from mpsl_dist.records.run_directory import RunDirectory


def find(path: str | Path, client: int | None = None) -> Path:
    """Return the folder of a model: the path itself, or ``model/`` in it.

    Parameters
    ----------
    client : int, optional
        Whose model it is, where every client has a whole one of its own.

    Raises
    ------
    RunError
        If there is none.
    """
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
        if own := sorted(folder.glob("client-*/config.json")):
            return _own_folder(folder, own[0].parent, client)
    if (path / "config.yaml").is_file():
        raise RunError(f"{path}: no model/ there; {_why_none(RunDirectory(path))}")
    what = "no model/ and no config.json there" if path.is_dir() else "no such folder"
    raise RunError(f"{path}: {what}; name a run directory, its model/ or an exported folder")


def _own_folder(folder: Path, first: Path, client: int | None) -> Path:
    if client is None:
        raise RunError(
            f"{folder}: its clients have each a whole model of their own; name one, {first}; "
            "predict and export take --client 0 as well, load client=0"
        )
    own = folder / Path(state.client_file(client)).stem
    if not (own / "config.json").is_file():
        raise RunError(f"client={client}: {folder} has no {own.name}; there are {first.name}, …")
    return own


def _why_none(run: RunDirectory) -> str:
    config = run.config()
    if run.summary().get("status") != "completed":
        return "the run must be completed"
    if config.get("method") == "mlecs" and config["mlecs"]["answer"] == "caption":
        return "what was trained writes captions (mlecs.answer: caption), and is not kept"
    if config.get("defences", {}).get("secret_tokenizers"):
        return "its clients keep their own tokenizers (defences.secret_tokenizers)"
    return "the run writes it again with --resume"


def run_of(folder: Path) -> Path | None:
    """Return the run directory that a model's folder lies in; None for one that stands alone."""
    for model in (folder.absolute(), folder.absolute().parent):
        if model.name == "model" and (model.parent / "config.yaml").is_file():
            return model.parent
    return None


def client_of(folder: Path) -> int | None:
    """Return the client whose whole model a run's folder holds; None for a model of all."""
    found = re.fullmatch(r"client-(\d+)", folder.name)
    return int(found[1]) if found and run_of(folder) else None


def own_weights(folder: Path, experiment: Experiment, client: int) -> dict[str, Tensor]:
    """Return a client's trained parameters from the run's last checkpoint.

    Raises
    ------
    UserError
        If clients keep none, or this one's are not there.
    """
    run, which = run_of(folder), f"client={client}"
    if facts_of(experiment).alone:
        raise ConfigError(f"{which}: {folder} is one client's whole model; leave it out")
    if not facts_of(experiment).split:
        raise ConfigError(f"{which}: with method={experiment.method} clients keep no own part")
    if not 0 <= client < experiment.clients:
        raise ConfigError(f"{which}: the run has the clients 0 to {experiment.clients - 1}")
    if run is None:
        raise RunError(f"{which}: {folder} is no run directory, where each client's own part lies")
    found = checkpoint.latest(run / "checkpoints")
    if found is None:
        raise RunError(f"{which}: {run / 'checkpoints'} holds no checkpoint")
    at, manifest = found
    told = RunDirectory(run).summary()
    if told.get("status") != "completed" or told.get("steps_completed") != manifest.step:
        raise RunError(f"{which}: {at} is not of the step that {folder} was written at; --resume")
    path = at / state.client_file(client)
    if manifest.files and path.name not in manifest.files:
        raise RunError(f"{which}: not in {at}: lost before the end of the run")
    if damage := state.damage(path, manifest.files.get(path.name)):
        raise RunError(f"{which}: {damage}")
    return state.load(path)["tokenizers"]
