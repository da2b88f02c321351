"""Pictures and spectrograms from the tokens that arrive, by linear algebra.

A patch token before the shared LayerNorm is z = W x + p. Behind it y = (t - β)/γ is known, and
z = s·y + μ·1 with two numbers more to find: W x - s·y - μ·1 = -p has d equations and P + 2
unknowns. The position p sets the scale, so that brightness comes back too.

Shape legend: ``n`` samples, ``l`` tokens (the first, of no patch, left out), ``d`` width, ``p``
pixels of a patch, ``c`` channels, ``h`` height, ``w`` width of a plane, ``r`` rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

_TOLERANCE = 1e-6
#: Planes up to this many pixels have their rank computed, larger ones counted.
_RANKED = 1200


@dataclass(frozen=True)
class Patches:
    """What the attacker knows of a tokenizer that cuts planes into patches.

    Attributes
    ----------
    weight_dp : Tensor
        W, float64.
    positions_ld : Tensor
        What stands in every token without a picture: the positions.
    gamma_d, beta_d : Tensor or None
        Of the LayerNorm behind; None where there is none.
    shape : tuple of int
        c, h, w of a plane.
    patch, stride, merge : int
        As of :class:`mpsl_dist.models.tokenizers.PatchTokenizer`.
    """

    weight_dp: Tensor
    positions_ld: Tensor
    gamma_d: Tensor | None
    beta_d: Tensor | None
    shape: tuple[int, int, int]
    patch: int
    stride: int
    merge: int = 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = ((side - self.patch) // self.stride + 1 for side in self.shape[1:])
        return rows, columns

    @property
    def normed(self) -> bool:
        """Whether a LayerNorm hides two numbers of every token."""
        return self.gamma_d is not None


def known_patches(tokenizer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> Patches | None:
    """Return what a tokenizer's weights tell, by what it computes; None if it cuts no patches."""
    convolution = getattr(tokenizer, "patchify", None)
    if not isinstance(convolution, nn.Conv2d):
        return None
    plane = (1, *shape) if len(shape) == 2 else shape
    with torch.no_grad():
        empty = tokenizer(torch.zeros(1, *shape, dtype=convolution.weight.dtype))
    gamma, beta = (getattr(norm, name, None) for name in ("weight", "bias"))
    return Patches(
        convolution.weight.detach().flatten(1).double(),
        empty[0, 1:].double(),
        None if gamma is None else gamma.detach().double(),
        None if beta is None else beta.detach().double(),
        plane,
        convolution.kernel_size[0],
        convolution.stride[0],
        getattr(tokenizer, "merge", 1),
    )


# -- planes and patches ------------------------------------------------------------------------


def cut(planes_nchw: Tensor, like: Patches) -> Tensor:
    """Return the patches (n, l, p) of planes; where tokens are merged, the means that they hold."""
    columns = functional.unfold(planes_nchw, like.patch, stride=like.stride)
    if like.merge > 1:
        squares = columns.unflatten(2, like.grid)
        columns = functional.avg_pool2d(squares, like.merge, ceil_mode=True).flatten(2)
    return columns.transpose(1, 2)


def join(patches_nlp: Tensor, like: Patches, background_chw: Tensor) -> Tensor:
    """Return planes of patches: means where they overlap, the background where none lies."""
    columns = patches_nlp.transpose(1, 2)
    if like.merge > 1:
        rows, across = (-(-side // like.merge) for side in like.grid)
        squares = columns.unflatten(2, (rows, across)).repeat_interleave(like.merge, 2)
        squares = squares.repeat_interleave(like.merge, 3)[:, :, : like.grid[0], : like.grid[1]]
        columns = squares.flatten(2)
    size = like.shape[1:]
    total = functional.fold(columns, size, like.patch, stride=like.stride)
    often = functional.fold(torch.ones_like(columns[:1]), size, like.patch, stride=like.stride)
    return torch.where(often > 0, total / often.clamp(min=1), background_chw)


# -- the exact solution ------------------------------------------------------------------------


@dataclass(frozen=True)
class Exactness:
    """What the weights say before any token arrives.

    Attributes
    ----------
    deficit : int
        Numbers of a patch, or of a plane whose patches overlap, that the equations leave open.
    condition : float
        The largest singular value of the equations' matrix over the smallest that is not zero.
    """

    deficit: int
    condition: float

    @property
    def exact(self) -> bool:
        """Whether pictures come back whole."""
        return self.deficit == 0


def exactness(known: Patches) -> Exactness:
    """Return how far the exact solution goes: the rank of its equations.

    A LayerNorm takes two of a token's d equations. Overlapping patches share their pixels, so they
    are counted, or up to :data:`_RANKED` pixels ranked, over the whole plane.
    """
    width, pixels = known.weight_dp.shape
    values = torch.linalg.svdvals(known.weight_dp)
    rank = int((values > _TOLERANCE * values[0]).sum())
    condition = float(values[0] / values[rank - 1])
    left = width - 2 if known.normed else width
    if known.stride >= known.patch or known.merge > 1:
        return Exactness(pixels - min(rank, left), condition)
    return _exactness_of_plane(known, min(rank, left), condition)


def _exactness_of_plane(known: Patches, each: int, condition: float) -> Exactness:
    one = torch.ones(1, *known.shape, dtype=torch.float64)
    ones_1lp = torch.ones_like(cut(one, replace(known, merge=1)))
    covered = int((join(ones_1lp, known, torch.zeros(known.shape).double()) > 0).sum())
    if one.numel() > _RANKED:
        tokens = known.grid[0] * known.grid[1]
        return Exactness(max(0, covered - each * tokens), condition)
    planes = torch.eye(one.numel(), dtype=torch.float64).view(-1, *known.shape)
    mapped = _convolve(planes, known)
    if known.normed:  # a LayerNorm hides two directions of every token: any two that differ
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(1, *mapped.shape[1:], generator=generator, dtype=torch.float64)
        mapped = _without(mapped, _hidden(drawn))
    values = torch.linalg.svdvals(mapped.flatten(1))
    rank = int((values > _TOLERANCE * values[0]).sum())
    return Exactness(covered - rank, float(values[0] / values[rank - 1]))


def solve(tokens_nld: Tensor, known: Patches, prior_chw: Tensor) -> Tensor:
    """Return the planes (n, c, h, w) that explain these tokens, float64.

    Where the equations leave something open the planes are those nearest to the prior.

    Parameters
    ----------
    tokens_nld : Tensor
        Patch tokens alone, as they arrived.
    prior_chw : Tensor
        A mean of public planes.
    """
    tokens_nld, prior = tokens_nld.double(), prior_chw.double()
    if known.normed:
        tokens_nld = (tokens_nld - known.beta_d) / known.gamma_d
    if known.stride < known.patch and known.merge == 1:
        return _solve_plane(tokens_nld, known, prior)
    prior_lp = cut(prior[None], known)[0]
    patches_nlp = _solve_patches(tokens_nld, known, prior_lp)
    return join(patches_nlp, known, prior)


def _solve_patches(y_nld: Tensor, known: Patches, prior_lp: Tensor) -> Tensor:
    weight = known.weight_dp
    u_dd, values, v_rp = torch.linalg.svd(weight)
    rank = int((values > _TOLERANCE * values[0]).sum())
    inverse_pd = v_rp[:rank].T / values[:rank] @ u_dd[:, :rank].T
    offset_ld = known.positions_ld + prior_lp @ weight.T
    if not known.normed:
        return prior_lp + (y_nld - offset_ld) @ inverse_pd.T
    # What no patch can explain tells scale and shift; where nothing is left, the prior does.
    told_md = u_dd[:, rank:].T
    if len(told_md) < 2:
        told_md = torch.cat([told_md, 1e-3 * inverse_pd])
    sides = _sides(y_nld, told_md)
    place_nl = _places(sides, known.positions_ld @ told_md.T, len(weight) - weight.shape[1])
    offset_nld = offset_ld[place_nl]
    scale_nl1, shift_nl1 = _scale_and_shift(y_nld, offset_nld, told_md, sides)
    z_nld = scale_nl1 * y_nld + shift_nl1
    patches_nlp = prior_lp[place_nl] + (z_nld - offset_nld) @ inverse_pd.T
    # Every patch where it belongs.
    return patches_nlp.gather(1, place_nl.argsort(1)[:, :, None].expand_as(patches_nlp))


def _sides(y_nld: Tensor, told_md: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors (m,) and (n, l, m) that span what the LayerNorm hides in what is told."""
    ones_m = functional.normalize(told_md.sum(1), dim=0)
    told_nlm = y_nld @ told_md.T
    rest_nlm = told_nlm - (told_nlm @ ones_m)[:, :, None] * ones_m
    return ones_m, functional.normalize(rest_nlm, dim=2)


def _scale_and_shift(
    y_nld: Tensor, offset_nld: Tensor, told_md: Tensor, sides: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return s and μ (n, l, 1) by least squares: the offset's told part in terms of y and 1."""
    ones_m, side_nlm = sides
    told_nlm, wanted_nlm = y_nld @ told_md.T, offset_nld @ told_md.T
    length_nl = (told_nlm * side_nlm).sum(2).clamp(min=1e-12)
    scale_nl = (wanted_nlm * side_nlm).sum(2) / length_nl
    shift_nl = (wanted_nlm - scale_nl[:, :, None] * told_nlm) @ ones_m / told_md.sum(1).norm()
    return scale_nl[:, :, None], shift_nl[:, :, None]


def _places(sides: tuple[Tensor, Tensor], positions_lm: Tensor, spare: int) -> Tensor:
    """Return the place (n, l) of every token: its own, unless others explain them far better.

    Without the two directions that the LayerNorm hides a token leaves nothing at its true place
    alone, if more equations are left than two. Under noise the smallest rest is anybody's.

    Parameters
    ----------
    positions_lm : Tensor
        What is told of every place.
    spare : int
        How many more numbers a token has than a patch.
    """
    from scipy.optimize import linear_sum_assignment

    ones_m, side_nlm = sides
    own_l = torch.arange(side_nlm.shape[1])
    if spare < 3:
        return own_l.expand(len(side_nlm), -1)
    sure_l = positions_lm.square().sum(1) - (positions_lm @ ones_m).square()
    found = []
    for side_lm in side_nlm:
        rest_ll = (sure_l - (side_lm @ positions_lm.T).square()).clamp(min=0)
        place_l = own_l
        if (rest_ll.argmin(1) == own_l).double().mean() < 0.5:
            place_l = torch.from_numpy(linear_sum_assignment(rest_ll.numpy())[1])
        better = 10 * rest_ll[own_l, place_l].sum() < rest_ll.diagonal().sum()
        found.append(place_l if better else own_l)
    return torch.stack(found)


def _solve_plane(y_nld: Tensor, known: Patches, prior_chw: Tensor) -> Tensor:
    """Solve all overlapping patches of a plane together, by conjugate gradients from the prior."""
    offset = _convolve(prior_chw[None], known) + known.positions_ld
    if known.normed:
        hidden = _hidden(y_nld)
        target = _without(-offset.expand_as(y_nld), hidden)
    else:
        hidden, target = None, y_nld - offset

    def normal(x: Tensor) -> Tensor:
        return _transposed(_without(_convolve(x, known), hidden), known)

    x = torch.zeros(len(y_nld), *known.shape, dtype=torch.float64)
    rest = way = _transposed(target, known)
    length = first = rest.flatten(1).square().sum(1)
    for _ in range(500):
        if bool((length <= 1e-24 * first).all()):
            break
        image = normal(way)
        step = length / (way * image).flatten(1).sum(1).clamp(min=1e-300)
        x, rest = x + step[:, None, None, None] * way, rest - step[:, None, None, None] * image
        fresh = rest.flatten(1).square().sum(1)
        way = rest + (fresh / length.clamp(min=1e-300))[:, None, None, None] * way
        length = fresh
    return prior_chw + x


def _convolve(planes: Tensor, known: Patches) -> Tensor:
    kernel = known.weight_dp.unflatten(1, (known.shape[0], known.patch, known.patch))
    return functional.conv2d(planes, kernel, stride=known.stride).flatten(2).transpose(1, 2)


def _transposed(tokens_nld: Tensor, known: Patches) -> Tensor:
    columns = (tokens_nld @ known.weight_dp).transpose(1, 2)
    return functional.fold(columns, known.shape[1:], known.patch, stride=known.stride)


def _hidden(y_nld: Tensor) -> Tensor:
    """Return the direction (n, l, d) that a LayerNorm hides besides the constant one."""
    return functional.normalize(y_nld - y_nld.mean(2, keepdim=True), dim=2)


def _without(tokens_nld: Tensor, hidden_nld: Tensor | None) -> Tensor:
    if hidden_nld is None:
        return tokens_nld
    centred = tokens_nld - tokens_nld.mean(2, keepdim=True)
    return centred - (centred * hidden_nld).sum(2, keepdim=True) * hidden_nld


# -- regression on public pictures -------------------------------------------------------------


@dataclass(frozen=True)
class Ridge:
    """A linear map from a token to its patch, learned from pairs that the attacker made.

    Attributes
    ----------
    weight_dp : Tensor
    tokens_ld, patches_lp : Tensor
        Means at every place.
    """

    weight_dp: Tensor
    tokens_ld: Tensor
    patches_lp: Tensor

    def guess(self, tokens_nld: Tensor) -> Tensor:
        """Return patches (n, l, p), float64."""
        return self.patches_lp + (tokens_nld.double() - self.tokens_ld) @ self.weight_dp


#: Penalties that are tried on a fifth of the pairs, as parts of the tokens' mean variance.
_PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)


def learn(tokens_nld: Tensor, patches_nlp: Tensor) -> Ridge:
    """Return the ridge regression of patches on their tokens; a fifth of the pairs chooses it."""
    tokens_nld, patches_nlp = tokens_nld.double(), patches_nlp.double()
    held = max(1, len(tokens_nld) // 5)
    trials = _ridges(tokens_nld[held:], patches_nlp[held:])
    losses = [
        float((one.guess(tokens_nld[:held]) - patches_nlp[:held]).square().mean()) for one in trials
    ]
    return _ridges(tokens_nld, patches_nlp)[losses.index(min(losses))]


def _ridges(tokens_nld: Tensor, patches_nlp: Tensor) -> list[Ridge]:
    tokens_ld, patches_lp = tokens_nld.mean(0), patches_nlp.mean(0)
    x, y = (tokens_nld - tokens_ld).flatten(0, 1), (patches_nlp - patches_lp).flatten(0, 1)
    values, basis_dd = torch.linalg.eigh(x.T @ x)
    turned = basis_dd.T @ (x.T @ y)
    scale = values.mean().clamp(min=1e-12)
    return [
        Ridge(
            basis_dd @ (turned / (values.clamp(min=0) + penalty * scale)[:, None]),
            tokens_ld,
            patches_lp,
        )
        for penalty in _PENALTIES
    ]
