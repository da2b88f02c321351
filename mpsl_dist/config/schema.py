"""Every key of an experiment: name, type, default and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mpsl_dist.config.m2fedsa import M2FedSA
from mpsl_dist.config.mlecs import Mlecs
from mpsl_dist.config.parts import Model, Weights


@dataclass(frozen=True)
class Partition:
    """How the training samples are spread over the clients."""

    #: ``dirichlet-balanced``: the released code's rule, where a client above the mean takes no
    #: more, and which gives up where clients stay below ``minimum`` (there 10); ``natural``: as the
    #: data names its owners, whatever they hold.
    kind: Literal["dirichlet", "dirichlet-balanced", "iid", "natural"] = "dirichlet"
    #: Concentration of the Dirichlet draw per class; smaller is more skewed.
    alpha: float = 0.1
    #: Every client holds at least this many samples.
    minimum: int = 1


@dataclass(frozen=True)
class Missing:
    """Parts of samples that are absent, see ``docs/missing.md``."""

    #: The chance that a part is left out, 0 to below 1; 0 leaves the data as they are. What is
    #: absent at one rate is so at every higher one, and nobody is left with nothing.
    rate: float = 0.0
    #: What is drawn for: each ``client`` and modality, which that client then never has, or each
    #: ``sample`` and modality.
    per: Literal["client", "sample"] = "client"
    #: Of the draws; null is the experiment's.
    seed: int | None = None
    #: Test samples lack parts too: a client's own as its training samples do, the server's one by
    #: one.
    at_test: bool = False
    #: Zeros stand in for what is absent, and are trained as if they were data.
    zeros: bool = False


@dataclass(frozen=True)
class Data:
    """What a sample is and where it lies."""

    #: The dataset.
    name: str = "digits-qa"
    #: Folder of the datasets that are read from disk.
    root: str | None = None
    #: ``own``: every host reads its own data alone, from its own ``data.root``, see
    #: ``docs/federation.md``; ``simulated``: every worker finds all of them, and takes its part.
    place: Literal["simulated", "own"] = "simulated"
    #: The classes in the order of their numbers; any other label is refused. Null takes those that
    #: the data have, with ``own`` those of all hosts together.
    classes: list[str] | None = None
    #: What a sample of retrieval is: a ``pair`` of a picture and a caption, or, as in the released
    #: code, a ``picture`` with all its captions, each of them encoded by itself. Batch sizes, steps
    #: and epochs count these.
    unit: Literal["pair", "picture"] = "pair"
    #: Who holds the test set: the server (a public benchmark), or the clients, a part each.
    test_at: Literal["server", "clients"] = "server"
    partition: Partition = field(default_factory=Partition)
    #: Length of a text in tokens, start and end included; null is the dataset's own.
    text_length: int | None = None
    #: ``manifest``, ``mnist-fsdd`` and plugins' datasets that have a choice: what to read, in the
    #: order of fusion; null is all that there is.
    modalities: list[str] | None = None
    #: Loader processes for each client, shared by the clients of a process (one a core is enough);
    #: 0 loads in the worker itself.
    loaders: int = 0
    #: Side of a picture in pixels; null is the dataset's own.
    image_size: int | None = None
    #: Length of a spectrogram in frames; null is the dataset's own, a manifest's as long as its
    #: sounds.
    audio_frames: int | None = None
    #: Mean and deviation that are taken out of pixels: ``imagenet``'s, ``clip``'s, ``half`` (both
    #: 0.5), or as the paper has it (``imagenet`` for pictures, none for frames of clips). Null
    #: takes those of ``weights.image``, and the paper's where it is ``random`` or a file.
    pixels: Literal["paper", "imagenet", "clip", "half"] | None = None
    #: ``skip`` counts files that cannot be read: in training another sample stands in, tests
    #: leave theirs out.
    on_error: Literal["raise", "skip"] | None = None
    #: With ``skip``: the share of a split's samples whose files may be missing, 0 to 1; null is
    #: 0.01.
    max_missing: float | None = None
    #: Folder that keeps decoded inputs between epochs and runs.
    cache: str | None = None
    #: Options of a plugin's dataset.
    options: dict[str, Any] = field(default_factory=dict)
    missing: Missing = field(default_factory=Missing)
    #: ``mlecs``: the share of the samples that is public, labels and all: the server's, and with
    #: their own modalities every device's; drawn by the seed. Of the test samples that the clients
    #: hold, the same share is the server's.
    public_fraction: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """One owner's optimizer and schedule."""

    #: Torch's optimizer of this name.
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    #: Learning rate.
    lr: float = 1e-4
    #: ``adamw`` takes it from the weights, the others add it to the gradient.
    weight_decay: float = 0.0
    #: Of ``sgd``.
    momentum: float = 0.0
    #: How the rate goes on: ``cosine`` falls to 0 at the run's end, ``step`` is multiplied by
    #: ``gamma`` every ``every_epochs`` epochs.
    schedule: Literal["constant", "cosine", "step"] = "constant"
    #: Steps in which the rate rises to its value.
    warmup_steps: int = 0
    #: Of the schedule ``step``.
    every_epochs: int = 5
    #: Of the schedule ``step``.
    gamma: float = 0.1


@dataclass(frozen=True)
class TokenizerSync:
    """Whether and how often the clients' tokenizers are brought together in training."""

    #: Never (the paper); step by averaged ``gradients``; or average the ``weights``.
    mode: Literal["none", "gradients", "weights"] = "none"
    #: In steps.
    every: int = 1
    #: The server learns only sums and averages of what clients send of their tokenizers, those of
    #: tests and of the model to deploy too, whatever the mode; see ``docs/masked.md``.
    masked: bool = False


@dataclass(frozen=True)
class Wire:
    """What crosses the cut layer, how often and as what, see ``docs/wire.md``."""

    #: ``fp32`` (numbers as they are), ``bf16``, ``fp8``, ``int8``, ``int4`` or ``int2``, the last
    #: four with a scale for each token.
    activations: str = "fp32"
    #: The same of the gradients that come back.
    gradients: str = "fp32"
    #: Of the gradients' whole numbers; ``stochastic`` keeps their mean. Activations are rounded to
    #: the nearest.
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    #: Every sample's activations cross once, and the server keeps them: with frozen tokenizers
    #: (``model.train_tokenizers: false``) and data without augmentation. See ``docs/cache.md``.
    cache: bool = False
    #: MiB of activations that the server keeps; beyond them the oldest are dropped, and sent again
    #: when needed. Null keeps all.
    cache_limit: int | None = None
    #: Keep the output of the encoder's last frozen block in their place
    #: (``model.encoder.trainable_blocks``): frozen blocks then see a sample once.
    cache_prefix: bool = False


@dataclass(frozen=True)
class Defences:
    """What a client does against an honest but curious server, see ``docs/defences.md``."""

    #: ε of randomised response on the training labels, drawn once a sample; the loss is corrected.
    label_epsilon: float | None = None
    #: Deviation of Gaussian noise on every number of the tokens, which LayerNorm makes about 1.
    token_noise: float = 0.0
    #: Weight of NoPeek's penalty, the distance correlation between inputs and tokens.
    nopeek: float = 0.0
    #: Noise on the gradients that go up, in lengths of a sample's gradient.
    gradient_noise: float = 0.0
    #: Every client has frozen tokenizers of its own drawing, which nobody else knows.
    secret_tokenizers: bool = False
    #: Patches leave in an order drawn for every sample and epoch, and have no positions: against a
    #: server that knows tokenizers and positions an order alone hides nothing, as it can try every
    #: position. What a patch shows is not hidden, where it was is.
    shuffle_patches: bool = False
    #: What the draws come from: null draws a secret for every client, which its run directory
    #: keeps; a file of the owner's, of 32 bytes or more; or ``seed``, which the server has: the
    #: same numbers in every run, for simulations alone.
    secret: str | None = None

    @property
    def draws(self) -> bool:
        """Whether anything is drawn."""
        noise = self.token_noise or self.gradient_noise or self.label_epsilon is not None
        return bool(noise or self.secret_tokenizers or self.shuffle_patches)


@dataclass(frozen=True)
class Federated:
    """What fedavg and fedclip do in a round, which is an epoch of ``training.epochs``."""

    #: Times that a client goes through its own samples in a round.
    local_epochs: int = 1
    #: Part of the clients that take part in a round, drawn anew for each.
    fraction: float = 1.0
    #: ``keep`` carries a client's optimizers from round to round (the released code), ``reset``
    #: begins every round with new ones.
    optimizer: Literal["keep", "reset"] = "keep"
    #: Samples of a local mini-batch; null takes a client's part of the global batches.
    batch_size: int | None = None
    #: Seconds until a client's whole round counts as failed, where above ``runtime.rpc_timeout``.
    round_timeout: float = 3600.0


@dataclass(frozen=True)
class Adapters:
    """The attention adapters of fedclip, on the pooled features of the frozen encoder."""

    #: An adapter for each of these modalities that the data has, or ``unified``: one for all.
    include: list[str] | Literal["unified"] = field(
        default_factory=lambda: ["image", "audio", "text"]
    )
    #: ``scaled`` multiplies a feature by its softmax (about 1/width of its size is left);
    #: ``released`` does so too, but for texts of late fusion and retrieval: there the released
    #: code's softmax runs over the captions, and leaves one alone as it is; ``residual`` adds the
    #: product to the feature.
    form: Literal["scaled", "released", "residual"] = "scaled"


@dataclass(frozen=True)
class Training:
    """Length, batches and optimizers of a training run."""

    #: Times that the training data are gone through; a federated round is one.
    epochs: int = 15
    #: Samples of the global batch, all clients together.
    batch_size: int = 128
    server: Optimizer = field(default_factory=Optimizer)
    client: Optimizer = field(default_factory=Optimizer)
    #: Of all numbers; ``float64`` is for tests of exactness.
    precision: Literal["float32", "float64"] = "float32"
    #: ``bf16``: the encoder's blocks (of ``mlecs`` the language models) compute in bfloat16 where
    #: torch's autocast has it so; weights, tokenizers, the cut layer and the head stay as they are.
    #: See ``docs/large.md``.
    autocast: Literal["bf16"] | None = None
    #: Keep the input of every block of the encoder alone, and compute the block again in the
    #: backward: less memory, a third more time.
    checkpoint_blocks: bool = False
    #: Compile the encoder's blocks by ``torch.compile``, which needs a C++ compiler (on a GPU
    #: Triton) on the server.
    compile: bool = False
    #: Evaluate each client's own tokenizers too, besides their average.
    evaluate_own: bool = False
    #: Test samples per evaluation batch.
    test_batch_size: int = 256


@dataclass(frozen=True)
class Checkpoint:
    """When the state of every rank is written."""

    #: After so many epochs; 0 turns the rule off, and both rules may stand together.
    every_epochs: int = 1
    #: After so many steps; 0 turns the rule off.
    every_steps: int = 0
    #: Complete checkpoints kept; older ones are removed.
    keep: int = 2


@dataclass(frozen=True)
class Tracking:
    """Who else is told of a run's metrics on the server, see ``docs/watching.md``."""

    #: Write TensorBoard's event files to ``tensorboard/`` in the run directory.
    tensorboard: bool = False
    #: ``package.module:function``, called with every line of ``metrics.jsonl`` as a dict.
    hook: str | None = None


@dataclass(frozen=True)
class Faults:
    """What becomes of a run whose clients are lost: killed, failed, stopped or too slow."""

    #: ``continue`` repeats the step without the lost; ``stop`` ends the run. ``psl`` always stops.
    on_loss: Literal["stop", "continue"] = "continue"
    #: With fewer clients than this the run stops.
    min_clients: int = 1
    #: Seconds until a client that does not answer counts as lost; null is ``runtime.rpc_timeout``.
    client_timeout: float | None = None
    #: A client whose loss or gradient is no finite number: ``stop`` ends the run,
    #: ``skip_client`` repeats the step without it.
    on_nonfinite: Literal["stop", "skip_client"] = "stop"
    #: When a worker that was started again is let in: before the next ``epoch``, ``now`` (before
    #: the next step), or ``never``.
    rejoin: Literal["epoch", "now", "never"] = "epoch"
    #: How often a worker's process that was lost is started again.
    restarts: int = 3
    #: Every so many steps clients write their own state, for their return; null leaves it to the
    #: others' tokenizers.
    save_clients_every: int | None = None
    #: Seconds after which a worker without a sign of life is killed, and workers leave a server
    #: without one; and from a stop signal, or the launching process's death, until every process is
    #: gone: time to end the step and write a checkpoint.
    exit_timeout: float = 30.0


@dataclass(frozen=True)
class Server:
    """The processes that the server's part of the model lives in."""

    #: Equal copies of encoder and head, each a process with a GPU of its own, that share every
    #: global batch; see ``docs/replicas.md``.
    replicas: int = 1
    #: Leave on every replica but a part of each parameter, of its gradient and of the optimizer's
    #: state: for encoders that do not fit one GPU.
    shard: bool = False


@dataclass(frozen=True)
class Runtime:
    """The connection between the processes."""

    #: Seconds until a call to a client counts as failed.
    rpc_timeout: float = 300.0
    #: Seconds until all processes must have met at the start.
    start_timeout: float = 300.0
    #: Network interface of the RPC traffic; null picks loopback on one host.
    interface: str | None = None
    #: ``tcp`` keeps same-host payloads on the socket, so that interface counters see them.
    channels: Literal["auto", "tcp"] = "auto"
    #: Compute threads of the server; null divides the host's cores.
    server_threads: int | None = None
    #: Compute threads of each worker; null divides the host's cores.
    worker_threads: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on."""

    #: Name of the run directory.
    name: str = "run"
    #: ``mpsl``, ``psl``, ``centralized``, ``standalone``, ``fedavg``, ``fedclip``, ``m2fedsa``,
    #: ``mlecs``, or a plugin's.
    method: str = "mpsl"
    #: Options of a plugin's method.
    method_options: dict[str, Any] = field(default_factory=dict)
    #: Modules that add datasets, tokenizers, heads or methods, see ``docs/extending.md``.
    plugins: list[str] = field(default_factory=list)
    #: Of every draw: weights, partition, order of samples.
    seed: int = 2024
    #: Folder of the run directories.
    output: str = "runs"
    #: ``auto``, ``cpu``, ``cuda`` (each rank its own GPU where there are several) or ``cuda:1``;
    #: ``auto`` takes CUDA where there is one.
    device: str = "auto"
    #: Clients of the run, each with data and tokenizers of its own.
    clients: int = 4
    #: Clients that share a worker's process.
    clients_per_worker: int = 1
    #: ``proportional``: every client's part of a global batch follows its share of the data;
    #: ``equal``: ceil(B/N) each until it runs dry, the released code's rule; ``centralized`` then
    #: has one pool, shuffled in every epoch and cut into batches of B.
    client_share: Literal["proportional", "equal"] = "proportional"
    tokenizer_sync: TokenizerSync = field(default_factory=TokenizerSync)
    wire: Wire = field(default_factory=Wire)
    #: Retrieval's negatives: each client's own mini-batch (the paper), or the global batch.
    contrastive: Literal["client", "global"] = "client"
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    weights: Weights = field(default_factory=Weights)
    training: Training = field(default_factory=Training)
    defences: Defences = field(default_factory=Defences)
    federated: Federated = field(default_factory=Federated)
    adapters: Adapters = field(default_factory=Adapters)
    m2fedsa: M2FedSA = field(default_factory=M2FedSA)
    mlecs: Mlecs = field(default_factory=Mlecs)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    faults: Faults = field(default_factory=Faults)
    server: Server = field(default_factory=Server)
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def workers(self) -> int:
        """RPC workers that host the clients."""
        return -(-self.clients // self.clients_per_worker)

    @property
    def run_directory(self) -> Path:
        """Where the run leaves everything."""
        return Path(self.output) / self.name
