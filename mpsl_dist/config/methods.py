"""Facts of every method, one row each; whoever needs to know asks here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mpsl_dist import plugins
from mpsl_dist.config.schema import Experiment
from mpsl_dist.typed import flatten

Owner = Literal["client", "server"]


@dataclass(frozen=True)
class MethodFacts:
    """A method that ``method`` may name.

    Attributes
    ----------
    build : callable, or its place as "package.module:name"
        ``build(setup)`` returns the method of a :class:`mpsl_dist.methods.hosting.Setup`, as
        :class:`mpsl_dist.methods.method.Method` describes it.
    tokenizers, server_model : "client" or "server"
        Who runs and trains each part of the model.
    reads : tuple of str
        Keys or sections of :data:`OPTIONAL` that it reads, those of ``faults`` apart.
    ignores : tuple of str
        Keys or sections that all others read, and it does not.
    one_process : bool
        Whether it has all the data in one process, without workers.
    adapted : bool
        Whether the encoder is frozen and surrounded by adapters.
    backwards : "one" or "per client"
        How many backward passes the server runs in a step.
    unimodal : bool
        Whether a user has a client for each modality, which sees no other; ``clients`` counts all.
    tolerant : bool
        Whether it goes on without clients that are lost, and so reads ``faults``.
    alone : bool
        Whether every client has a whole model of its own, which nobody else ever has, and tests it
        where it is.
    common : bool
        Whether it trains the model of ``model``, as others do, and not one of its own.
    options : type, optional
        A frozen dataclass: what ``method_options`` may say.
    """

    build: str | Callable[..., Any]
    tokenizers: Owner = "client"
    server_model: Owner = "server"
    reads: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    one_process: bool = False
    adapted: bool = False
    unimodal: bool = False
    backwards: Literal["one", "per client"] = "one"
    tolerant: bool = False
    alone: bool = False
    common: bool = True
    options: type | None = None

    @property
    def split(self) -> bool:
        """Whether the model is cut between client and server, so that activations travel."""
        return self.tokenizers != self.server_model


#: What a method reads that goes on without lost clients.
_FAULTS = tuple(
    f"faults.{key}"
    for key in (
        "on_loss",
        "min_clients",
        "client_timeout",
        "on_nonfinite",
        "rejoin",
        "restarts",
        "save_clients_every",
    )
)
_REMOTE = (
    "clients_per_worker",
    "data.missing",
    "data.test_at",
    "runtime.channels",
    "runtime.interface",
    "runtime.rpc_timeout",
    "runtime.start_timeout",
    "runtime.worker_threads",
)
_SPLIT = (
    *_REMOTE,
    "contrastive",
    "defences",
    "model.head_at",
    "tokenizer_sync",
    "training.compile",
    "training.evaluate_own",
    "wire",
)
_GROUP = ("server.replicas", "server.shard")
_ROUNDS = (*_REMOTE, "federated")
#: What only some methods read.
OPTIONAL = (
    *(*_SPLIT, *_GROUP, *_FAULTS),
    *("adapters", "federated", "federated.round_timeout", "data.public_fraction"),
    *("m2fedsa", "mlecs"),
)

METHODS: dict[str, MethodFacts] = {
    "mpsl": MethodFacts("mpsl_dist.methods.mpsl:build", reads=(*_SPLIT, *_GROUP), tolerant=True),
    "psl": MethodFacts("mpsl_dist.methods.psl:build", reads=_SPLIT, backwards="per client"),
    "fedavg": MethodFacts(
        "mpsl_dist.methods.fedavg:build", server_model="client", reads=_ROUNDS, tolerant=True
    ),
    "fedclip": MethodFacts(
        "mpsl_dist.methods.fedavg:build",
        server_model="client",
        reads=(*_ROUNDS, "adapters"),
        ignores=("model.encoder.trainable_blocks",),
        adapted=True,
        tolerant=True,
    ),
    "m2fedsa": MethodFacts(
        "mpsl_dist.methods.m2fedsa:build",
        reads=(*(key for key in _REMOTE if key != "data.missing"), "m2fedsa"),
        unimodal=True,
        tolerant=True,
    ),
    "standalone": MethodFacts(
        "mpsl_dist.methods.standalone:build",
        server_model="client",
        reads=(
            *_REMOTE,
            "federated.batch_size",
            "federated.local_epochs",
            "federated.round_timeout",
        ),
        tolerant=True,
        alone=True,
    ),
    "mlecs": MethodFacts(
        "mpsl_dist.methods.mlecs:build",
        server_model="client",
        reads=(
            *(*_REMOTE, "federated.round_timeout"),
            *("data.missing", "data.public_fraction", "mlecs"),
        ),
        ignores=(
            *("model.encoder", "model.head", "model.fusion", "model.pooling"),
            *("client_share", "training.checkpoint_blocks"),
        ),
        tolerant=True,
        common=False,
    ),
    "centralized": MethodFacts(
        "mpsl_dist.methods.centralized:build",
        tokenizers="server",
        reads=("data.missing",),
        one_process=True,
    ),
}


def facts_of(experiment: Experiment) -> MethodFacts:
    """Return the facts of the experiment's method.

    Raises
    ------
    ConfigError
        If there is no such method.
    """
    return plugins.find("methods", experiment.method, METHODS, experiment.plugins, "method")


def options_of(experiment: Experiment) -> Any:
    """Return the method's own options, checked, by a ConfigError; None where it has none."""
    return plugins.options(
        facts_of(experiment).options, experiment.method_options, "method_options"
    )


def processes_of(experiment: Experiment) -> int:
    """Return how many processes a run has: the server's replicas and the workers, or one."""
    if facts_of(experiment).one_process:
        return 1
    return experiment.server.replicas + experiment.workers


def goes_on(experiment: Experiment) -> bool:
    """Return whether a run goes on without clients that are lost."""
    return facts_of(experiment).tolerant and experiment.faults.on_loss == "continue"


def comes_back(experiment: Experiment) -> bool:
    """Return whether workers that are lost may come back into the run."""
    faults = experiment.faults
    return goes_on(experiment) and faults.rejoin != "never" and faults.restarts > 0


def unread(experiment: Experiment) -> list[str]:
    """Return the keys that are set to other than their defaults and that the method never reads."""
    facts, defaults = facts_of(experiment), flatten(Experiment())
    return [
        key
        for key, value in flatten(experiment).items()
        if not _reads(facts, key) and value != defaults.get(key)
    ]


def readers(key: str) -> list[str]:
    """Return those of our methods that read a key."""
    return [name for name, facts in METHODS.items() if _reads(facts, key)]


def _reads(facts: MethodFacts, key: str) -> bool:
    reads = (*facts.reads, *_FAULTS) if facts.tolerant else facts.reads
    return not _below(key, (*OPTIONAL, *facts.ignores)) or _below(key, reads)


def _below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
