"""CLIP's frozen text tower (Radford et al. 2021) as a tokenizer: a text becomes one token.

Shape legend: ``b`` batch, ``l`` length in byte-pair tokens, ``d`` the encoder's width, ``w`` the
tower's width, ``e`` its projected width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsl_dist.errors import ConfigError

#: Tokens of a text that CLIP was trained on, start and end included.
CONTEXT = 77


def default_tower(width: int) -> str:
    """Return open_clip's name of the tower that the released code has for an encoder's width."""
    return "ViT-L-14-quickgelu" if width >= 1024 else "ViT-B-16-quickgelu"


def build_text_tower(name: str) -> nn.Module:
    """Build open_clip's text tower with random weights.

    Parameters
    ----------
    name : str
        An architecture of open_clip with the classic CLIP text transformer. OpenAI's weights need
        one whose name ends in ``-quickgelu``: they were trained with that activation.

    Raises
    ------
    ConfigError
        If open_clip has no such architecture, or its text tower is another model.
    """
    from open_clip import get_model_config
    from open_clip.transformer import QuickGELU, TextTransformer

    settings: dict[str, Any] | None = get_model_config(name)
    if settings is None:
        raise ConfigError(f"model.text_tower: open_clip has no architecture '{name}'")
    text = dict(settings["text_cfg"])
    known = {"context_length", "vocab_size", "width", "heads", "layers"}
    if set(text) - known:
        odd = ", ".join(sorted(set(text) - known))
        raise ConfigError(
            f"model.text_tower: '{name}' is no classic CLIP text tower (it has {odd})"
        )
    return TextTransformer(
        **text,
        output_dim=settings["embed_dim"],
        act_layer=QuickGELU if settings.get("quick_gelu") else nn.GELU,
    )


class ClipText(nn.Module):
    """Embed a text by a frozen CLIP text tower: pooled, projected, ONE token of width d.

    The projected embedding is zero-padded to the encoder's width, as the released code does it.
    Where the encoder is narrower than that, a fixed random projection brings it down (the released
    code has no tower there).

    Each text is embedded by itself and once: what comes out is a function of the text alone,
    whatever batch it came in, and later epochs cost nothing. One instance serves all clients of a
    process; copies of it are the same object.

    Parameters
    ----------
    tower : nn.Module
        open_clip's ``TextTransformer``. Never trained: it gets no gradient here.
    dimension : int
        Width d of a token.
    """

    length = 1

    def __init__(self, tower: nn.Module, dimension: int) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.dimension = dimension
        embedded = int(tower.output_dim)
        if embedded > dimension:
            generator = torch.Generator().manual_seed(embedded)
            narrow = torch.randn(embedded, dimension, generator=generator, device="cpu")
            device = tower.positional_embedding.device
            self.register_buffer("narrow_ed", narrow.to(device) * dimension**-0.5)
        else:
            self.narrow_ed = None
        self._known: dict[tuple[int, ...], Tensor] = {}

    def train(self, mode: bool = True) -> ClipText:
        """Stay in evaluation mode."""
        return self

    def _apply(self, *arguments: Any, **options: Any) -> ClipText:
        self._known.clear()  # embeddings of another type or device
        return super()._apply(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClipText:
        return self

    @torch.no_grad()
    def encode(self, tokens_bl: Tensor) -> Tensor:
        """Run the tower on texts of at most :data:`CONTEXT` tokens.

        The tower is causal and pools at the end-of-text token, so the padding after it changes
        nothing, and shorter rows cost less.

        Parameters
        ----------
        tokens_bl : Tensor
            (b, l) int64.

        Returns
        -------
        Tensor
            (b, d) embeddings.
        """
        tower, length = self.tower, tokens_bl.shape[1]
        mask_ll = tower.attn_mask[:length, :length]
        embedded_blw = tower.token_embedding(tokens_bl) + tower.positional_embedding[:length]
        encoded_blw = tower.ln_final(tower.transformer(embedded_blw, attn_mask=mask_ll))
        rows = torch.arange(len(tokens_bl), device=tokens_bl.device)
        pooled_be = encoded_blw[rows, tokens_bl.argmax(-1)] @ tower.text_projection
        if self.narrow_ed is not None:
            return pooled_be @ self.narrow_ed
        return functional.pad(pooled_be, (0, self.dimension - pooled_be.shape[1]))

    def forward(self, tokens_bl: Tensor) -> Tensor:
        """Return one token per text, (b, 1, d), of byte-pair tokens (b, l), int64."""
        texts = [tuple(row) for row in tokens_bl.tolist()]
        for row, text in enumerate(texts):
            if text not in self._known:
                self._known[text] = self.encode(tokens_bl[row : row + 1])[0]
        return torch.stack([self._known[text] for text in texts]).unsqueeze(1)
