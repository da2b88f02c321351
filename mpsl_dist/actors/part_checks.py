"""What an experiment says of its parts, ours or plugins', that cannot be done; before any is built.

Every refusal is a line, so that a user meets all of them at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import nn

from mpsl_dist import plugins
from mpsl_dist.actors import assembly, defences, halves
from mpsl_dist.actors.checks import (
    check_cache,
    check_defences,
    check_missing,
    check_patches,
    check_task,
    check_unimodal,
)
from mpsl_dist.actors.choices import dtype_of, head_named, head_of, head_options, width_of, wire_of
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import METHODS, facts_of, options_of
from mpsl_dist.data import Splits
from mpsl_dist.data.catalog import DATASETS
from mpsl_dist.errors import ConfigError, UserError
from mpsl_dist.models.heads import HEADS
from mpsl_dist.models.tokenizers import Tokenizers


def refusals_without_data(experiment: Experiment) -> list[str]:
    """Return what can be refused before the data is there: names and options of the parts."""
    kind = experiment.model.head.kind
    checks: list[Callable[[], object]] = [
        lambda: options_of(experiment),
        lambda: wire_of(experiment),
    ]
    if kind is not None:
        checks.append(lambda: head_options(experiment, head_named(experiment, kind)))
    checks += [
        lambda modality=modality: assembly.tokenizer_options(experiment, modality)
        for modality in experiment.model.tokenizers
    ]
    secret = experiment.defences.secret
    if secret not in (None, "seed") and experiment.data.place == "simulated":
        checks.append(lambda: defences.read_secret(secret))
    return _built_in(experiment) + _lines([*checks, *_taken(experiment)])


def refusals_with_data(experiment: Experiment, splits: Splits) -> list[str]:
    """Return what the parts cannot do with this data.

    The parts are built without their numbers, so that what their builders refuse is met too.
    """
    checks: list[Callable[[], object]] = [
        lambda: check_patches(experiment, splits),
        lambda: check_task(experiment, splits),
        lambda: check_cache(experiment, splits),
        lambda: check_defences(experiment, splits),
        lambda: check_missing(experiment, splits),
        lambda: check_unimodal(experiment, splits),
        lambda: head_options(experiment, head_of(experiment, splits)[1]),
    ]
    checks += [
        lambda modality=modality: assembly.tokenizer_options(experiment, modality)
        for modality in splits.shapes
    ]
    refused = _without_a_use(experiment, splits) + _lines(checks)
    return refused or _lines([lambda: _build(experiment, splits)])


def _built_in(experiment: Experiment) -> list[str]:
    """Refuse that hosts have data of their own which are the same everywhere."""
    name = experiment.data.name
    if experiment.data.place == "simulated" or name not in DATASETS or DATASETS[name].files:
        return []
    return [f"data.place: own, but {name} is built in, the same everywhere; data.place=simulated"]


def _build(experiment: Experiment, splits: Splits) -> None:
    try:
        tokenizers, model = assembly.build_on_meta(experiment, splits)
        _try_tokenizers(experiment, splits, tokenizers)
        _refuse_changing(experiment, tokenizers)
        # One of them is an identity.
        _try_head(experiment, splits, nn.Sequential(model.head, tokenizers.head))
        if facts_of(experiment).unimodal:
            halves.build_on_meta(experiment, splits)
    except RuntimeError as error:
        # A part may read numbers that are not there; it can still work where they are.
        if "meta" not in str(error):
            raise


def _try_tokenizers(experiment: Experiment, splits: Splits, tokenizers: Tokenizers) -> None:
    """Refuse a plugin's tokenizer that makes something else than it says."""
    for modality in splits.shapes.keys() - assembly.TOKENIZERS.keys():
        integers = assembly.tokenizer_facts(experiment, modality).integers
        dtype = torch.long if integers else dtype_of(experiment)
        x = torch.empty((2, *splits.shapes[modality]), dtype=dtype, device="meta")
        tokenizer = tokenizers.by_modality[modality]
        found = tuple(tokenizer(x).shape)
        wanted = (2, tokenizer.length, width_of(experiment))
        if found != wanted:
            raise ConfigError(
                f"model.tokenizers.{modality}: two inputs gave tokens {found}, not {wanted}, "
                "(inputs, length, model.encoder.width)"
            )


def _refuse_changing(experiment: Experiment, tokenizers: Tokenizers) -> None:
    """Refuse ``wire.cache`` for a plugin's tokenizer whose tokens change, frozen as it is."""
    changing = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    for modality, tokenizer in tokenizers.by_modality.items():
        if experiment.wire.cache and any(isinstance(m, changing) for m in tokenizer.modules()):
            raise ConfigError(
                f"wire.cache: the tokenizer of {modality} has dropout or batch norm, so that its "
                "tokens change from step to step; set wire.cache=false"
            )


def _try_head(experiment: Experiment, splits: Splits, head: nn.Module) -> None:
    """Refuse a plugin's head that makes no prediction a sample."""
    kind, facts = head_of(experiment, splits)
    if kind in HEADS:
        return
    width, modalities = width_of(experiment), len(splits.shapes)
    shape = (2, modalities, width) if facts.apart else (2, width)
    found = tuple(head(torch.empty(shape, dtype=dtype_of(experiment), device="meta")).shape)
    if splits.classes and found != (2, len(splits.classes)):
        raise ConfigError(
            f"model.head.kind: '{kind}' made {found} of two samples, not "
            f"{(2, len(splits.classes))}, (samples, classes)"
        )
    if not splits.classes and (len(found) != 3 or found[:2] != (2, 2)):
        raise ConfigError(f"model.head.kind: '{kind}' made {found} of two pairs, not (2, 2, any)")


def _without_a_use(experiment: Experiment, splits: Splits) -> list[str]:
    there = list(splits.shapes)
    lines = []
    for name in experiment.model.tokenizers:
        if name not in there:
            near = difflib.get_close_matches(str(name), there, n=1)
            hint = f"; did you mean 'model.tokenizers.{near[0]}'?" if near else ""
            has = f"{experiment.data.name} has {', '.join(there)}"
            lines.append(f"model.tokenizers.{name}: {has}{hint}")
    return lines


def _taken(experiment: Experiment) -> list[Callable[[], object]]:
    """Return checks that no installed package has a name of ours that is chosen here."""
    model, data = experiment.model, experiment.data
    chosen = (
        ("datasets", data.name, DATASETS, "data.name"),
        ("methods", experiment.method, METHODS, "method"),
        ("heads", model.head.kind, HEADS, "model.head.kind"),
        *(
            ("tokenizers", modality, assembly.TOKENIZERS, f"model.tokenizers.{modality}")
            for modality in model.tokenizers
        ),
    )
    return [lambda one=one: plugins.refuse_taken(*one) for one in chosen]


def _lines(checks: Iterable[Callable[[], object]]) -> list[str]:
    found: list[str] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found += str(error).splitlines()
    return list(dict.fromkeys(found))
