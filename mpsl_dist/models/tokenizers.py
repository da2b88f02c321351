"""The clients' part W_h of the model: light modality tokenizers, and maybe the head W_t.

Shape legend: ``b`` batch, ``c`` channels, ``h`` height, ``w`` width, ``t`` frames, ``m`` mel bins,
``l`` length in tokens, ``p`` pixels of a patch, ``d`` the encoder's width.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")
_STD = 0.02
#: How the names of a modality's own parameters begin; an adapter may be all modalities'.
_OF_A_MODALITY = re.compile(
    r"((tokenizers\.)?(head\.)?by_modality|(server_model\.)?adapters\.by_name(?!\.unified\.))\.(?P<name>[^.]+)\."
)


@dataclass(frozen=True)
class TokenizerFacts:
    """How a modality becomes tokens.

    Attributes
    ----------
    build : callable, or its name as "package.module:attribute"
        ``build(shape, width, options)`` returns a module that maps inputs (b, *shape) to tokens
        (b, l, d) and has the number of them, l, as its ``length``.
    options : type, optional
        A frozen dataclass: what ``model.tokenizers.<modality>`` may say.
    integers : bool
        Whether inputs are whole numbers, int64, as a text's tokens are.
    """

    build: str | Callable[..., nn.Module]
    options: type | None = None
    integers: bool = False


class Patchify(nn.Conv2d):
    """A convolution over square patches, (b, c, h, w) -> (b, l, d), row by row.

    Without overlap it is one product of matrices: of a few small pictures, as a client's mini-batch
    holds, five times as fast as torch's convolution, forward and backward together.
    """

    def forward(self, plane_bchw: Tensor) -> Tensor:
        """Return the patches' embeddings; what is left over at the lower and right edge is cut."""
        patch, stride = self.kernel_size[0], self.stride[0]
        if stride != patch:
            return super().forward(plane_bchw).flatten(2).transpose(1, 2)
        rows, columns = (side // patch for side in plane_bchw.shape[2:])
        whole_bchw = plane_bchw[:, :, : rows * patch, : columns * patch]
        cut = whole_bchw.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        pixels_blp = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return functional.linear(pixels_blp, self.weight.flatten(1))


class PatchTokenizer(nn.Module):
    """Cut a plane into patches, embed each, put a CLS token in front, add learned positions.

    With ``stride == patch`` this is ViT's patchify (images, Dosovitskiy et al. 2020); with kernel
    16 and stride 10 over (frames, mel bins) it is AST's (audio, Gong et al. 2021). The convolution
    has no bias, as in the released code.

    Parameters
    ----------
    channels, height, width : int
        The input plane: (channels, height, width).
    patch, stride : int
        In pixels, or in frames and mel bins.
    dimension : int
        Width d of a token.
    merge : int
        Side of the square of neighbouring patches whose tokens become one, their mean; squares at
        the far edges may be smaller. Parameters are those of all patches, whatever it is.
    placed : bool
        Whether there are positions.

    Raises
    ------
    ValueError
        If not even one patch fits.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        patch: int,
        stride: int,
        dimension: int,
        merge: int = 1,
        placed: bool = True,
    ) -> None:
        super().__init__()
        if min(height, width) < patch:
            raise ValueError(f"a patch of {patch} does not fit an input of {height}x{width}")
        self.patchify = Patchify(channels, dimension, patch, stride, bias=False)
        self.grid = ((height - patch) // stride + 1, (width - patch) // stride + 1)
        self.merge = merge
        rows, columns = (-(-side // merge) for side in self.grid)
        self.length = rows * columns + 1
        self.cls = nn.Parameter(torch.empty(1, 1, dimension))
        patches = self.grid[0] * self.grid[1]
        self.positions = nn.Parameter(torch.empty(1, patches + 1, dimension)) if placed else None
        nn.init.normal_(self.cls, std=_STD)
        if placed:
            nn.init.normal_(self.positions, std=_STD)

    def forward(self, plane_bchw: Tensor) -> Tensor:
        """Return tokens (b, l, d) of planes (b, c, h, w); audio may come as (b, t, m)."""
        if plane_bchw.dim() == 3:
            plane_bchw = plane_bchw.unsqueeze(1)
        patches_bld = self.patchify(plane_bchw)
        cls_b1d = self.cls.expand(len(patches_bld), -1, -1)
        tokens_bld = torch.cat([cls_b1d, patches_bld], dim=1)
        if self.positions is not None:
            tokens_bld = tokens_bld + self.positions
        return tokens_bld if self.merge == 1 else self._merged(tokens_bld)

    def _merged(self, tokens_bld: Tensor) -> Tensor:
        patches_bdhw = tokens_bld[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        means_bdhw = functional.avg_pool2d(patches_bdhw, self.merge, ceil_mode=True)
        return torch.cat([tokens_bld[:, :1], means_bdhw.flatten(2).transpose(1, 2)], dim=1)


class TextTokenizer(nn.Module):
    """Embed byte-pair tokens by a table and add learned positions.

    CLIP's start-of-text token stands first in every text and serves as its CLS.

    Parameters
    ----------
    table : nn.Embedding
        (vocabulary, d). Shared where the caller shares it: a frozen table is needed once a process.
    length : int
        Tokens per text.
    """

    def __init__(self, table: nn.Embedding, length: int) -> None:
        super().__init__()
        self.table = table
        self.length = length
        self.positions = nn.Parameter(torch.empty(1, length, table.embedding_dim))
        nn.init.normal_(self.positions, std=_STD)

    def forward(self, tokens_bl: Tensor) -> Tensor:
        """Return tokens (b, l, d) of byte-pair tokens (b, l), int64."""
        return self.table(tokens_bl) + self.positions


def token_table(rows: int, dimension: int, trainable: bool) -> nn.Embedding:
    """Return a text token table (rows, dimension), random normal; frozen unless ``trainable``."""
    table = nn.Embedding(rows, dimension)
    nn.init.normal_(table.weight, std=_STD)
    table.weight.requires_grad_(trainable)
    return table


class Tokenizers(nn.Module):
    """One client's part of the model: its tokenizers W_h = {T_m} and the LayerNorm that its tokens
    share; with ``model.head_at: client`` its head W_t too.

    Parameters
    ----------
    by_modality : mapping of str to nn.Module
        In the order in which the modalities are fused.
    dimension : int
        Width d of a token.
    pre_norm : bool
        Whether a trained LayerNorm ends the tokenizers.
    """

    def __init__(
        self, by_modality: Mapping[str, nn.Module], dimension: int, pre_norm: bool
    ) -> None:
        super().__init__()
        self.by_modality = nn.ModuleDict(by_modality)
        self.pre_norm = nn.LayerNorm(dimension) if pre_norm else nn.Identity()
        #: From what the server returns to predictions: nothing where the server owns the head.
        self.head: nn.Module = nn.Identity()

    @property
    def lengths(self) -> list[int]:
        """Tokens per modality, in fusion order."""
        return [int(tokenizer.length) for tokenizer in self.by_modality.values()]

    def forward(
        self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Return the tokens of inputs by modality, (b, l_m, d) each, in fusion order.

        Of several captions of a sample, (b, c, l), the tokens follow each other, (b, c * l_m, d).

        Parameters
        ----------
        present : mapping of str to Tensor, optional
            Which samples have a modality, (b,) bool: there are tokens (b_m, l_m, d) of those alone,
            and none of a modality that no sample has.
        """
        if present is None:
            return [self.pre_norm(self._tokens(name, inputs[name])) for name in self.by_modality]
        there = [name for name in present if bool(present[name].any())]
        rows = {name: inputs[name][present[name].to(inputs[name].device)] for name in there}
        return [self.pre_norm(self.by_modality[name](rows[name])) for name in there]

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        tokenizer = self.by_modality[name]
        if name == "text" and x.dim() == 3:
            return tokenizer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)
        return tokenizer(x)

    def only(self, modalities: Collection[str]) -> Tokenizers:
        """Return the same with these modalities' tokenizers alone; every part is shared."""
        kept = {name: t for name, t in self.by_modality.items() if name in modalities}
        found = Tokenizers(kept, 0, pre_norm=False)
        found.pre_norm, found.head = self.pre_norm, self.head
        return found


def modality_of(parameter: str) -> str | None:
    """Return whose tokenizer, head or adapter a parameter is in, by its name in the tokenizers, in
    the server's part or in the whole model; None of what the modalities share.
    """
    found = _OF_A_MODALITY.match(parameter)
    return found and found["name"]


def of_modalities(weights: Mapping[str, T], modalities: Collection[str]) -> Mapping[str, T]:
    """Return those of these values by parameter that are of these modalities, or of none; all of
    them where ``modalities`` is empty.
    """
    held = (None, *modalities)
    return {k: x for k, x in weights.items() if modality_of(k) in held} if modalities else weights


def fuse(tokens: Sequence[Tensor], fusion: str) -> list[Tensor]:
    """Return the modalities' tokens as they cross the cut layer (Eq. 1).

    Parameters
    ----------
    tokens : sequence of Tensor
        (b, l_m, d) per modality.
    fusion : "early" or "late"
        ``early``: one joint tensor (b, sum of l_m, d); ``late``: the modalities' own tensors.
    """
    return [torch.cat(list(tokens), dim=1)] if fusion == "early" else list(tokens)


def copy_of(tokenizers: Tokenizers) -> Tokenizers:
    """Return a copy for another client of this process; what is frozen is shared with it."""
    frozen: dict[int, object] = {id(p): p for p in tokenizers.parameters() if not p.requires_grad}
    frozen |= {id(part): part for part in tokenizers.modules() if _is_frozen(part)}
    return copy.deepcopy(tokenizers, memo=frozen)


def _is_frozen(part: nn.Module) -> bool:
    """Return whether a part has parameters and no state that could move (norms' buffers can)."""
    parameters = list(part.parameters())
    moves = any(p.requires_grad for p in parameters) or any(True for _ in part.buffers())
    return bool(parameters) and not moves
