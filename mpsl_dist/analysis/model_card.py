"""A trained model as a folder that a model hub takes as it is: weights, description and card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from mpsl_dist.actors import model_folder, predictor
from mpsl_dist.config import Experiment, from_dict, to_dict
from mpsl_dist.config.loading import HOST_KEYS
from mpsl_dist.config.methods import facts_of
from mpsl_dist.errors import ConfigError, DataError, RunError
from mpsl_dist.reading import read_json
from mpsl_dist.records.run_directory import RunDirectory, write_atomic
from mpsl_dist.records.traffic import KINDS
from mpsl_dist.typed import flatten

#: What lies in an exported folder.
_WEIGHTS, _DESCRIPTION, _CARD = "model.safetensors", "config.json", "README.md"
#: What our methods are, and whose.
_METHODS = {
    "mpsl": "Multimodal Parallel Split Learning, arXiv 2502.06355",
    "psl": "naive parallel split learning: a forward and a backward of the server for each client, "
    "which Multimodal Parallel Split Learning, arXiv 2502.06355, makes one of",
    "fedavg": "FedAvg, McMahan et al., 2017",
    "fedclip": "FedCLIP, Lu et al., 2023",
    "m2fedsa": "M²FedSA, Zhang, Qi and Xu, ICML 2024",
    "standalone": "local training alone, every client a model of its own",
    "mlecs": "ML-ECS, Liu et al.",
    "centralized": "training in one place",
}
#: What devices of ML-ECS send, by ``mlecs.exchange``.
_EXCHANGED = {
    "lora": "their language models' trained LoRA factors",
    "all": "all that they had trained",
    "proxy": "their trained encoders and a proxy model's LoRA factors",
    "none": "no parameters",
}
#: Keys of ``mlecs`` by which it is another method than the paper's.
_RULES = ("exchange", "aggregate", "contrast", "transfer", "ranks", "edit", "proximal")


def export(
    model: str | Path, to: Path, client: int | None, licence: str, overwrite: bool
) -> list[Path]:
    """Write a model and its card; return the files.

    Parameters
    ----------
    model : str or Path
        A run directory, or its ``model/``.
    to : Path
        The folder, which need not exist yet; other files in it stay as they are.
    client : int or None
        Whose own part is taken, in place of the average.
    licence : str
        For the card's header.
    overwrite : bool
        Whether an earlier export may be replaced.

    Raises
    ------
    UserError
        If there is no model, the run tells nothing of it, or the folder stands in the way.
    """
    source = model_folder.find(model, client)
    client = model_folder.client_of(source) if client is None else client
    run = model_folder.run_of(source)
    if run is None:
        raise RunError(f"{source}: the card is filled from the run; export from its directory")
    _check_folder(source, to, overwrite)
    loaded = predictor.load(source, "device=cpu", client=client)
    description = read_json(source / _DESCRIPTION)
    experiment = from_dict(description["experiment"] | {"weights": {}})
    description["experiment"] = _without_places(description["experiment"])
    description["modalities"] = [*loaded.modalities]
    card = _card(RunDirectory(run), experiment, description, client, licence)
    with _writing(to):
        to.mkdir(parents=True, exist_ok=True)
        partial = to / f"{_WEIGHTS}.partial"
        save_file(loaded.model.stored(), partial, metadata={"format": "pt"})
        partial.replace(to / _WEIGHTS)
        write_atomic(to / _DESCRIPTION, json.dumps(description, indent=2) + "\n")
        write_atomic(to / _CARD, card)
    return [to / name for name in (_WEIGHTS, _DESCRIPTION, _CARD)]


def _check_folder(source: Path, to: Path, overwrite: bool) -> None:
    if to.exists() and not to.is_dir():
        raise ConfigError(f"--to: {to} is no folder; name another")
    if to.exists() and to.samefile(source):
        raise ConfigError(f"--to: {to} is the run's own model; name another folder")
    if to.exists() and any(to.iterdir()) and not overwrite:
        raise ConfigError(f"--to: {to} holds files; replace them with --overwrite, or name another")


@contextlib.contextmanager
def _writing(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"--to: {to} cannot be written: {reason}") from error


def _without_places(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment that names no folder, device or interface of the host it ran on."""
    told, defaults = json.loads(json.dumps(values)), to_dict(Experiment())
    for key in HOST_KEYS:
        *parents, last = key.split(".")
        into, default = told, defaults
        for parent in parents:
            into, default = into.get(parent, {}), default[parent]
        if last in into:
            into[last] = default[last]
    for part in ("encoder", "image", "audio", "text"):
        if "/" in (source := str(told.get("weights", {}).get(part, ""))):
            told["weights"][part] = Path(source).name
    return told


# -- the card --------------------------------------------------------------------------------------


def _card(
    run: RunDirectory,
    experiment: Experiment,
    description: Mapping[str, Any],
    client: int | None,
    licence: str,
) -> str:
    summary = run.summary()
    if summary.get("status") != "completed":
        raise RunError(f"{run.path}: summary.json is of no completed run; --resume completes it")
    modalities = description["modalities"]
    parts = [
        f"---\n{yaml.safe_dump(_header(summary, modalities, client, licence), sort_keys=False)}---",
        f"# {experiment.name}",
        _about(experiment, description, client),
        "## Use",
        _use(modalities, bool(description["classes"])),
        "## Figures",
        _figures(summary, client) + _explained(summary),
        "## Data",
        _data(experiment, summary),
        "## Method",
        _method(experiment, summary),
        "## Versions",
        _versions(run.path),
        "## Privacy",
        _privacy(experiment, summary, client),
    ]
    return "\n\n".join(parts) + "\n"


def _header(
    summary: Mapping[str, Any], modalities: list[str], client: int | None, licence: str
) -> dict[str, Any]:
    """Return the metadata that a hub reads: the figures only of the model that they are of."""
    task = "classification" if summary["data"].get("classes") else "retrieval"
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "mpsl_dist",
        "tags": ["mpsl_dist", summary["method"], "multimodal", task, *modalities],
        "metrics": ["accuracy" if task == "classification" else "recall"],
    }
    if client is not None:
        return header
    metrics = [
        {"type": "f1" if "f1" in name else header["metrics"][0], "value": value, "name": name}
        for name, value in _tested(summary).items()
    ]
    result = {
        "task": {"type": task},
        "dataset": {"name": summary["dataset"], "type": summary["dataset"], "split": "test"},
        "metrics": metrics,
    }
    return header | {"model-index": [{"name": summary["name"], "results": [result]}]}


def _tested(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the model's figures, first those of a call with all modalities.

    These are the fusion's, where there is one; and the server's alone, where clients have models of
    their own.
    """
    test = summary["test"]
    fused = {name: x for name, x in test.items() if name.endswith("_fused")}
    return {name: x for name, x in test.items() if name.startswith("server_")} or fused | test


def _about(experiment: Experiment, description: Mapping[str, Any], client: int | None) -> str:
    classes = description["classes"]
    does = (
        f"tells {len(classes)} classes apart: {', '.join(classes[:20])}"
        + (", …" if len(classes) > 20 else "")
        if classes
        else "tells which things of two modalities belong together"
    )
    part = "model" if facts_of(experiment).alone else "part"
    whose = "" if client is None else f" It holds client {client}'s own {part}, not the average."
    inputs = " and ".join(description["modalities"])
    return f"From {inputs}, it {does}. Trained by mpsl_dist on {experiment.data.name}.{whose}"


def _use(modalities: list[str], classifies: bool) -> str:
    examples = {"image": '"a.png"', "audio": '"a.wav"', "text": '"…"'}
    given = ", ".join(f"{name}={examples.get(name, 'tensor')}" for name in modalities)
    call = "predict" if classifies else "similarity"
    return (
        f'```python\nimport mpsl_dist\n\nmodel = mpsl_dist.load("this-folder")\n'
        f"print(model.{call}({given}))\n```\n\n"
        "`config.json` may name modules of the user's own under `plugins`: they are imported."
    )


def _figures(summary: Mapping[str, Any], client: int | None) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| test {name} | {value:.4f} |" for name, value in _tested(summary).items()]
    lines += [f"| baseline {name} | {value:.4f} |" for name, value in summary["baselines"].items()]
    if client is not None:
        alone = summary["method"] == "standalone"
        what = "all clients' own models" if alone else "the average of all clients"
        lines += ["", f"The test is of {what}, not of this client's alone."]
    return "\n".join(lines)


def _explained(summary: Mapping[str, Any]) -> str:
    if "accuracy_fused" not in summary["test"]:
        return ""
    return (
        "\n\n`accuracy_fused` is of answers from all modalities together, as above; the others are "
        "of one modality alone, and `accuracy` is their mean."
    )


def _data(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    samples = {split: summary["data"][split]["samples"] for split in ("train", "test")}
    rule = experiment.data.partition
    how = f"Dir({rule.alpha:g})" if rule.kind == "dirichlet" else rule.kind
    if facts_of(experiment).unimodal:
        how += ", a client for each modality of a user"
    if experiment.data.public_fraction:
        how += f", {experiment.data.public_fraction:.0%} of the samples public"
    return (
        f"{experiment.data.name}: {samples['train']} samples for training, {samples['test']} for "
        f"testing; {experiment.clients} clients, {how}. Their licence is the data's own."
    )


def _method(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    training, trained = experiment.training, summary["trainable_parameters"]
    sent = summary["communication"]
    lines = [
        f"- method: {_named(experiment)}",
        f"- {summary['epochs_completed']} epochs, {summary['steps_completed']} steps, global batch "
        f"{training.batch_size}, seed {summary['seed']}",
        f"- trained parameters: client {trained.get('client', 0)}, "
        f"server {trained.get('server', 0)}",
    ]
    if not facts_of(experiment).one_process:
        up, down = (sent[f"{way}_bytes_per_client_per_epoch"] / 2**20 for way in ("up", "down"))
        lines.append(f"- per client and epoch: {up:.2f} MiB up, {down:.2f} MiB down")
        lines.append(f"- what crossed: {_crossed(sent)}")
    lines.append(f"- {summary['seconds']['total']:.0f} s")
    return "\n".join(lines)


def _named(experiment: Experiment) -> str:
    """Return a method's name, whose it is, and what of its rules is not the paper's."""
    name = experiment.method
    told = [_METHODS[name]] if name in _METHODS else []
    if name == "mlecs":
        usual, own = flatten(Experiment().mlecs), flatten(experiment.mlecs)
        other = [f"mlecs.{key}={own[key]}" for key in _RULES if own[key] != usual[key]]
        told += [f"here {', '.join(other)}"] if other else []
    return f"{name} ({'; '.join(told)})" if told else name


def _crossed(sent: Mapping[str, Any]) -> str:
    """Return the kinds of tensors that were counted between clients and server."""
    kinds = sent.get("total_bytes_by_kind")
    if kinds is None:
        return "not recorded"
    ways = {way: [k for k in kinds if k in KINDS and KINDS[k][0] == way] for way in ("up", "down")}
    told = [f"{way} {', '.join(named)}" for way, named in ways.items() if named]
    return "; ".join(told) or "no tensor"


def _versions(run: Path) -> str:
    if not (run / "environment.json").is_file():
        return "Not recorded."
    found = read_json(run / "environment.json")
    packages = {"mpsl_dist": found.get("mpsl_dist"), "python": found.get("python")}
    packages |= found.get("packages", {})
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _privacy(experiment: Experiment, summary: Mapping[str, Any], client: int | None) -> str:
    if facts_of(experiment).one_process:
        text = "All training data lay in one process: nothing was kept from it."
    elif facts_of(experiment).alone:
        text = "Raw inputs, labels and weights stayed with the clients; each trained alone."
    elif facts_of(experiment).split:
        text = (
            "Raw inputs and labels stayed with the clients; the server of the run saw activations "
            "and gradients, which tell of both, and for averages "
            f"{'sums' if experiment.tokenizer_sync.masked else 'the weights'} of what clients had "
            "trained. Split learning is no differential privacy."
        )
    elif experiment.method == "mlecs":
        text = _privacy_of_mlecs(experiment, summary)
    else:
        text = (
            "Raw inputs and labels stayed with the clients, which sent trained weights: those tell "
            "of their data. Federated averaging is no differential privacy."
        )
    worth = {name: value for name, value in summary.get("privacy", {}).items() if value is not None}
    if worth:
        told = ", ".join(f"{name} {value:g}" for name, value in worth.items())
        text += f" Its defences were worth: {told}."
    text += " Whoever has these weights may learn from them what the training data were."
    if client is not None:
        text += f" Client {client}'s part was made of its data alone: hand it on with its consent."
    return text


def _privacy_of_mlecs(experiment: Experiment, summary: Mapping[str, Any]) -> str:
    exchange = experiment.mlecs.exchange
    text = f"Raw inputs and labels stayed with the clients, which sent {_EXCHANGED[exchange]}"
    text += "." if exchange == "none" else ": those tell of their data."
    if "fused_down" in (summary["communication"].get("total_bytes_by_kind") or {}):
        text += " They were sent a table of fused public samples."
    if experiment.data.public_fraction:
        text += " Public samples were everybody's, labels and all."
    return f"{text} Tuning together is no differential privacy."
