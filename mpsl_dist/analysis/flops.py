"""Operations and memory of the actors' parts, counted on shapes alone: nothing is computed.

The parts are built by the same functions as for a run, on torch's meta device.

Shape legend: ``b`` batch, ``l`` length in tokens, ``d`` width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpsl_dist.actors import assembly, choices, halves
from mpsl_dist.analysis.cost_inputs import Inputs
from mpsl_dist.config import ConfigError, Experiment
from mpsl_dist.config import Optimizer as OptimizerSettings
from mpsl_dist.config.methods import facts_of
from mpsl_dist.models.clip_text import ClipText
from mpsl_dist.models.connector import Connected
from mpsl_dist.models.server_model import ServerModel
from mpsl_dist.models.tasks import Task
from mpsl_dist.models.tokenizers import Tokenizers, fuse

#: What is counted beside the modalities and the passes: the head, and the norm after the encoder
#: where no head follows it.
HEAD, NORM = "head", "post-norm"
#: Small encoders and connector; and what they make of all modalities together.
CONNECTOR, SOFT = "connector", "soft tokens"


@dataclass(frozen=True)
class Flops:
    """Operations for one sample.

    Attributes
    ----------
    forward, training : int
        FLOPs, 2 per multiply-add, of matrix products, convolutions and attention; ``training`` is
        forward and backward, without gradients that nothing asks for.
    paper : float
        What the paper's tables have: multiply-adds of linear layers and convolutions and 5 per
        element of LayerNorm, attention's own products left out, *halved*; forward only.
    """

    forward: int = 0
    training: int = 0
    paper: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.forward + other.forward,
            self.training + other.training,
            self.paper + other.paper,
        )

    def times(self, count: int) -> Flops:
        """Return the operations of ``count`` such passes."""
        return Flops(self.forward * count, self.training * count, self.paper * count)


@dataclass(frozen=True)
class ClientParts:
    """Tokenizers on the meta device.

    Attributes
    ----------
    tokenizers : Tokenizers
        W_h, without its frozen text tower's weights where ``model.text=clip``; and W_t, where
        clients own it.
    """

    experiment: Experiment
    inputs: Inputs
    tokenizers: Tokenizers

    @property
    def width(self) -> int:
        """The encoder's width d."""
        return choices.width_of(self.experiment)

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameters and activations."""
        return choices.dtype_of(self.experiment)

    @property
    def bytes_per_number(self) -> int:
        """Bytes of one number of a parameter or activation."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class ModelParts(ClientParts):
    """A method's modules on the meta device.

    Attributes
    ----------
    server_model : ServerModel
        W_b, and W_t where clients own none; M²FedSA's upper halves.
    """

    server_model: ServerModel

    @property
    def task(self) -> Task:
        """What is to be learned."""
        return choices.task_of(self.inputs.splits())

    @property
    def retrieval(self) -> bool:
        """Whether images and texts are encoded apart, without a classifier."""
        return self.inputs.retrieval


def build(experiment: Experiment, inputs: Inputs) -> ModelParts:
    """Build a method's parts on the meta device, where they take no memory."""
    unimodal = facts_of(experiment).unimodal
    try:
        build_on_meta = halves.build_on_meta if unimodal else assembly.build_on_meta
        parts = build_on_meta(experiment, inputs.splits())
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise ConfigError(f"cost: a part reads numbers while it is built: {error}") from error
    return ModelParts(experiment, inputs, *parts)


def meta_inputs(parts: ClientParts, batch: int) -> dict[str, Tensor]:
    """Return inputs without content of ``batch`` samples, by modality, on the meta device."""
    found = {}
    for name, shape in parts.inputs.shapes.items():
        integers = assembly.tokenizer_facts(parts.experiment, name).integers
        dtype = torch.long if integers else parts.dtype
        found[name] = torch.empty((batch, *shape), device="meta", dtype=dtype)
    return found


def embed(parts: ClientParts, name: str, batch: int) -> Tensor:
    """Return a modality's tokens (b, l, d) as :class:`Tokenizers` would."""
    tokenizer, x = parts.tokenizers.by_modality[name], meta_inputs(parts, batch)[name]
    # A tower's own pass keeps what it saw, by content; here there is none.
    tokens_bld = tokenizer.encode(x).unsqueeze(1) if isinstance(tokenizer, ClipText) else None
    return parts.tokenizers.pre_norm(tokenizer(x) if tokens_bld is None else tokens_bld)


def leaving(parts: ClientParts, batch: int) -> dict[str, Tensor]:
    """Return what crosses the cut, (b, l, d): every modality's tokens, or a connector's.

    The tokens of several captions of a sample follow each other.
    """
    own, times = parts.tokenizers, parts.inputs.times
    each = {name: embed(parts, name, batch * times(name)) for name in parts.inputs.shapes}
    tokens = {name: x.reshape(batch, -1, x.shape[-1]) for name, x in each.items()}
    return {SOFT: own.connect(tokens)} if isinstance(own, Connected) else tokens


def leaving_names(parts: ClientParts) -> list[str]:
    """Return the names that :func:`leaving` has, without computing."""
    return [SOFT] if isinstance(parts.tokenizers, Connected) else list(parts.inputs.shapes)


def count_client(parts: ModelParts) -> dict[str, Flops]:
    """Return a client's operations per sample, as :func:`count_tokenizers` and, if it owns one,
    those of its head.
    """
    counted, own = count_tokenizers(parts), parts.tokenizers.head
    if (head := count(own, lambda: own(features(parts)))).forward:
        counted[HEAD] = head
    return counted


def count_tokenizers(parts: ClientParts) -> dict[str, Flops]:
    """Return operations per sample by modality, of small encoders and connector together; the
    frozen text tower apart.
    """
    counted = {}
    for name, tokenizer in parts.tokenizers.by_modality.items():
        texts = parts.inputs.times(name)
        if isinstance(tokenizer, ClipText):
            x = meta_inputs(parts, 1)[name]
            tower = count(tokenizer, lambda t=tokenizer, x=x: t.encode(x))
            counted["text tower"] = tower.times(texts)
            token_b1d = torch.empty(1, 1, choices.token_width_of(parts.experiment), device="meta")
            run = count(parts.tokenizers.pre_norm, lambda x=token_b1d: parts.tokenizers.pre_norm(x))
        else:
            run = count(parts.tokenizers, lambda name=name: embed(parts, name, 1))
        counted[name] = run.times(texts)
    if isinstance(connected := parts.tokenizers, Connected):
        known = {n: embed(parts, n, 1) for n in parts.inputs.shapes}
        tokens = {n: torch.empty_like(x, requires_grad=x.requires_grad) for n, x in known.items()}
        counted[CONNECTOR] = count(connected, lambda: connected.connect(tokens))
    return counted


def count_server(parts: ModelParts) -> dict[str, Flops]:
    """Return the server's operations per sample: by pass of the encoder, and the head.

    Early fusion has one pass, ``joint``; late fusion and retrieval one per modality. FedCLIP's
    adapters and the norm after the encoder count with the head; where clients own it, the norm is
    left.
    """
    model = parts.server_model
    lengths = _passes(parts)
    counted = {}
    for name, length in lengths.items():
        run = count_encoder(model.encoder, _tokens(parts, length))
        counted[name] = run.times(parts.inputs.times(name))
    if not parts.retrieval:
        smashed = [_tokens(parts, length) for length in lengths.values()]
        with _without_encoder(model):
            after = count(model, lambda: model(smashed))
        if not choices.clients_own_head(parts.experiment):
            counted[HEAD] = after
        elif after.paper:
            counted[NORM] = after
    elif (head := count(model.head, lambda: model.head(features(parts)))).forward:
        counted[HEAD] = head  # our own computes nothing but dot products
    return counted


def features(parts: ModelParts, batch: int = 1) -> Tensor:
    """Return what a head takes of ``batch`` samples; it asks for a gradient as in training."""
    apart = len(parts.inputs.shapes) + parts.inputs.captions - 1
    modalities = (apart,) if parts.server_model.apart else ()
    shape = (batch, *modalities, parts.width)
    model = parts.server_model
    before = (model.encoder, model.post_norm, model.adapters)
    trained = any(p.requires_grad for part in before for p in part.parameters())
    asked = trained or cut_trained(parts)
    return torch.empty(shape, device="meta", dtype=parts.dtype, requires_grad=asked)


def cut_trained(parts: ModelParts) -> bool:
    """Return whether any gradient comes back through the cut layer."""
    return any(tokens_bld.requires_grad for tokens_bld in leaving(parts, 1).values())


def count_encoder(encoder: nn.Sequential, tokens_bld: Tensor) -> Flops:
    """Return the operations of a pass; blocks differ only in whether they are trained."""
    known: dict[tuple[bool, bool], Flops] = {}
    total, asked = Flops(), tokens_bld.requires_grad
    for block in encoder:
        trained = any(p.requires_grad for p in block.parameters())
        if (trained, asked) not in known:
            x_bld = torch.empty_like(tokens_bld, requires_grad=asked)
            known[trained, asked] = count(block, lambda b=block, x=x_bld: b(x))
        total += known[trained, asked]
        asked = asked or trained
    return total


@contextmanager
def _without_encoder(model: ServerModel) -> Iterator[None]:
    encoder, model.encoder = model.encoder, nn.Identity()
    try:
        yield
    finally:
        model.encoder = encoder


def _passes(parts: ModelParts) -> dict[str, int]:
    """Return the encoder's passes for a sample: name -> tokens."""
    names, lengths = list(parts.inputs.shapes), parts.tokenizers.lengths
    if parts.server_model.fusion == "early":
        return {"joint": sum(lengths)}
    return dict(zip(names, lengths, strict=True))


def _tokens(parts: ModelParts, length: int) -> Tensor:
    shape, kind = (1, length, parts.width), parts.dtype
    return torch.empty(shape, device="meta", dtype=kind, requires_grad=cut_trained(parts))


def count(module: nn.Module, run: Callable[[], Tensor]) -> Flops:
    """Return the operations of one run of (parts of) a module.

    Parameters
    ----------
    module : nn.Module
        Where to look for layers.
    run : callable
        Runs it once on a batch of one, and returns the resulting tensor.
    """
    # The fused attention kernels of the CPU are unknown to torch's counter: the plain one is not.
    with sdpa_kernel([SDPBackend.MATH]):
        with FlopCounterMode(display=False) as counter, _paper_counter(module) as paper:
            result = run()
        forward = counter.get_total_flops()
        training = forward
        if result.requires_grad:
            with FlopCounterMode(display=False) as counter:
                torch.autograd.backward(result, torch.empty_like(result))
            training += counter.get_total_flops()
    module.zero_grad(set_to_none=True)
    return Flops(forward, training, sum(paper) / 2)


@contextmanager
def _paper_counter(module: nn.Module) -> Iterator[list[int]]:
    counted: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.LayerNorm):
            counted.append(5 * output.numel())
        elif isinstance(layer, nn.Linear):
            counted.append(output.numel() * layer.in_features)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            counted.append(output.numel() * layer.weight[0].numel())

    handles = [layer.register_forward_hook(note) for layer in module.modules()]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def kept_by_client(parts: ModelParts, batch: int) -> int:
    """Return the bytes that a client's autograd keeps for the backward of ``batch`` samples."""
    own = parts.tokenizers

    def run() -> list[Tensor]:
        tokens = list(leaving(parts, batch).values())
        return [*fuse(tokens, parts.experiment.model.fusion), own.head(features(parts, batch))]

    return kept_bytes(own, run)


def kept_by_server(parts: ModelParts, batch: int) -> int:
    """Return the bytes that the server's autograd keeps for the backward of ``batch`` samples."""
    trained = cut_trained(parts)
    passes = _passes(parts)
    lengths = list(passes.values())

    def run() -> Tensor:
        times = parts.inputs.times
        tokens = [
            torch.empty(
                batch, length * times(name), parts.width, device="meta", requires_grad=trained
            )
            for name, length in passes.items()
        ]
        return parts.server_model(tokens)

    kept = kept_bytes(parts.server_model, run, lengths)
    encoder = parts.server_model.encoder
    if not encoder.checkpoint_blocks:
        return kept
    # One block at a time is computed again, and then keeps what it would have kept.
    shapes = [(batch * parts.inputs.times(name), n, parts.width) for name, n in passes.items()]
    tokens = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    again = [kept_bytes(encoder[-1], lambda x=x: encoder[-1](x), lengths) for x in tokens]
    return kept + max(again)


def kept_bytes(
    module: nn.Module, run: Callable[[], object], sequences: Collection[int] = ()
) -> int:
    """Return the bytes that autograd saves in a run, parameters aside.

    Attention's l x l matrices, l one of ``sequences``, are left out: the fused kernels, which a
    run uses on CPU and GPU, do not keep them.
    """
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        matrix = saved.dim() > 2 and saved.shape[-1] == saved.shape[-2] in sequences
        if storage._cdata not in own and not matrix:
            kept[storage._cdata] = storage
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        graph = run()  # held until all is counted, so that no storage is counted twice
        total = sum(storage.nbytes() for storage in kept.values())
    del graph
    return total


def moments(settings: OptimizerSettings) -> int:
    """Return how many numbers an optimizer keeps for each that it steps."""
    return 2 if settings.name != "sgd" else int(settings.momentum > 0)


def parameters(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return (all, trainable) parameters by module; one shared by two counts for the first."""
    seen: set[int] = set()
    counted = {}
    for name, module in modules.items():
        own = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen |= own.keys()
        trained = sum(p.numel() for p in own.values() if p.requires_grad)
        counted[name] = (sum(p.numel() for p in own.values()), trained)
    return counted
