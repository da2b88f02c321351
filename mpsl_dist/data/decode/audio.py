"""Sound as log-mel spectrograms.

Shape legend: ``s`` samples of a waveform, ``t`` frames, ``m`` mel bins.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

#: Samples per second that every spectrogram is made of.
RATE = 16_000
#: Samples of one frame (25 ms) and from one frame to the next (10 ms).
FRAME, HOP = 400, 160
#: Mel bins of a frame.
MEL_BINS = 128
#: Whose spectrogram: Kaldi's, of :func:`fbank`, or Whisper's, of :func:`log_mel`.
Sounds = Literal["kaldi", "whisper"]
#: Mel bins of a frame, by whose spectrogram it is.
BINS: dict[Sounds, int] = {"kaldi": MEL_BINS, "whisper": 80}
#: Mean and twice the standard deviation of AudioSet's log-mel values: what AST's weights expect.
AST_MEAN, AST_SCALE = -4.2677393, 2 * 4.5689974
#: Kaldi's defaults: the next power of two above a frame, and its emphasis of high frequencies.
_FFT, _PREEMPHASIS = 512, 0.97


def samples_for(frames: int) -> int:
    """Return the length in samples of the shortest waveform with this many frames."""
    return FRAME + (frames - 1) * HOP


def fit(waveform: Tensor, samples: int, start: int = 0) -> Tensor:
    """Return a window of a waveform, padded with silence on the right.

    Parameters
    ----------
    waveform : Tensor
        (..., s) float32.
    samples : int
        Length of the window.
    start : int
        Where the window begins; clipped so that it covers as much sound as it can.

    Returns
    -------
    Tensor
        (..., samples) float32.
    """
    start = max(0, min(start, waveform.shape[-1] - samples))
    cut = waveform[..., start : start + samples]
    return torch.nn.functional.pad(cut, (0, samples - cut.shape[-1]))


def fbank(waveform: Tensor, frames: int) -> Tensor:
    """Return Kaldi's log-mel filterbank: htk-compatible, Hann window, 25 ms every 10 ms, no dither.

    The same values as ``torchaudio.compliance.kaldi.fbank``, of any number of waveforms at once and
    without making the mel filters anew each time.

    Parameters
    ----------
    waveform : Tensor
        (..., s) float32 at 16 kHz; its mean is subtracted; cut or padded with silence at its end.
    frames : int
        Frames of the result.

    Returns
    -------
    Tensor
        (..., frames, 128) float32, natural logarithm of the energies, neither shifted nor scaled.
    """
    fitted = fit(waveform, samples_for(frames))
    pieces = (fitted - fitted.mean(-1, keepdim=True)).unfold(-1, FRAME, HOP)
    pieces = pieces - pieces.mean(-1, keepdim=True)
    before = torch.cat([pieces[..., :1], pieces[..., :-1]], dim=-1)
    window, filters = _filters()
    spectrum = torch.fft.rfft((pieces - _PREEMPHASIS * before) * window, n=_FFT).abs().square()
    return (spectrum @ filters).clamp_min(torch.finfo(torch.float32).eps).log()


def log_mel(waveform: Tensor, frames: int) -> Tensor:
    """Return Whisper's log-mel spectrogram: Slaney's scale, 25 ms centred every 10 ms.

    The same values as the released ``log_mel_spectrogram`` of a waveform that is ``frames`` long.

    Parameters
    ----------
    waveform : Tensor
        (..., s) float32 at 16 kHz, cut or padded with silence at its end.
    frames : int
        Frames of the result, at least 2.

    Returns
    -------
    Tensor
        (..., frames, 80) float32: the logarithm to the base 10, from 8 below the loudest value on,
        plus 4, over 4.
    """
    fitted = fit(waveform, frames * HOP)
    window, filters = _whisper_filters()
    spectrum = torch.stft(
        fitted.reshape(-1, frames * HOP), FRAME, HOP, window=window, return_complex=True
    )
    power = spectrum[..., :-1].abs().square().reshape(*fitted.shape[:-1], -1, frames)
    values = (power.transpose(-1, -2) @ filters).clamp_min(1e-10).log10()
    return (torch.maximum(values, values.amax((-1, -2), keepdim=True) - 8) + 4) / 4


@cache
def _whisper_filters() -> tuple[Tensor, Tensor]:
    """Return the window (400,) and the mel filters (201, 80)."""
    from torchaudio import functional

    filters = functional.melscale_fbanks(
        FRAME // 2 + 1, 0.0, RATE / 2, BINS["whisper"], RATE, norm="slaney", mel_scale="slaney"
    )
    return torch.hann_window(FRAME), filters


@cache
def _filters() -> tuple[Tensor, Tensor]:
    """Return the window (400,) and the mel filters (257, 128)."""
    from torchaudio.compliance import kaldi

    filters, _ = kaldi.get_mel_banks(MEL_BINS, _FFT, float(RATE), 20.0, 0.0, 100.0, -500.0, 1.0)
    window = torch.hann_window(FRAME, periodic=False)
    # The filters leave out the highest frequency.
    return window, torch.nn.functional.pad(filters, (0, 1)).T.contiguous()


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Return waveforms (..., s) of ``rate`` samples per second, resampled to 16 kHz."""
    from torchaudio import functional

    return waveform if rate == RATE else functional.resample(waveform, rate, RATE)
