"""Sound as log-mel spectrograms.

Shape legend: ``s`` samples of a waveform, ``t`` frames, ``m`` mel bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Samples per second that every spectrogram is made of.
RATE = 16_000
#: Samples of one frame (25 ms) and from one frame to the next (10 ms).
FRAME, HOP = 400, 160
#: Mel bins of a frame.
MEL_BINS = 128
#: Mean and twice the standard deviation of AudioSet's log-mel values: what AST's weights expect.
AST_MEAN, AST_SCALE = -4.2677393, 2 * 4.5689974


def samples_for(frames: int) -> int:
    """Give the length of the shortest waveform with this many frames, in samples."""
    return FRAME + (frames - 1) * HOP


def fit(waveform: Tensor, samples: int, start: int = 0) -> Tensor:
    """Cut a window out of a waveform, padded with silence on the right.

    Parameters
    ----------
    waveform : Tensor
        (s,) float32.
    samples : int
        Length of the window.
    start : int
        Where the window begins; clipped so that it covers as much sound as it can.

    Returns
    -------
    Tensor
        (samples,) float32.
    """
    start = max(0, min(start, len(waveform) - samples))
    cut = waveform[start : start + samples]
    return torch.nn.functional.pad(cut, (0, samples - len(cut)))


def fbank(waveform: Tensor, frames: int) -> Tensor:
    """Give Kaldi's log-mel filterbank: htk-compatible, Hann window, 25 ms every 10 ms, no dither.

    Parameters
    ----------
    waveform : Tensor
        (s,) float32 at 16 kHz; its mean is subtracted; cut or padded with silence at its end.
    frames : int
        Frames of the result.

    Returns
    -------
    Tensor
        (frames, 128) float32, natural logarithm of the energies, neither shifted nor scaled.
    """
    from torchaudio.compliance import kaldi

    fitted = fit(waveform, samples_for(frames))
    return kaldi.fbank(
        (fitted - fitted.mean())[None],
        htk_compat=True,
        window_type="hanning",
        num_mel_bins=MEL_BINS,
        sample_frequency=RATE,
        dither=0.0,
    )


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Bring a waveform (s,) from ``rate`` samples per second to 16 kHz."""
    from torchaudio import functional

    return waveform if rate == RATE else functional.resample(waveform, rate, RATE)
