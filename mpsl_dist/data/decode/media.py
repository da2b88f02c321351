"""Pictures, video frames and sound out of files of any usual format.

Every fault of a file (missing, empty, truncated, broken header, no sound track, not a medium at
all) is a :class:`DataError` that names it; nothing else leaves these functions. What a file *is*
follows from its content, not from its name: an mp3 called ``.wav`` is read as an mp3.

Shape legend: ``h`` height, ``w`` width, ``s`` samples of a waveform.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mpsl_dist.data.decode import audio
from mpsl_dist.errors import DataError

#: Pixels of the largest picture that is decoded: a header may promise any size.
MAX_PIXELS = 100_000_000
#: Seconds of sound and pictures of a clip that are decoded at most.
MAX_SECONDS, MAX_FRAMES = 3_600.0, 20_000
#: Samples per second that a recording may have.
_RATES = (1_000, 768_000)
#: Only containers of media. Playlists (hls, concat, …) would make a file open other files.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,wav,aiff,au,flac,ogg,mp3,aac,mpeg,mpegts,flv,asf"
)
#: In these the length is an estimate, so that ending early is no sign of damage.
_ESTIMATED = frozenset({"mp3", "aac", "mpeg", "mpegts"})
#: These have no index, so that a seek leads to frames that others are missing for.
_UNSEEKABLE = frozenset({"mpeg", "mpegts"})
#: Sizes in a wav header that was written before its sound was: "as large as can be".
_ENDLESS = ((0x7FFF_0000, 0x8001_0000), (0xFFFF_FF00, 0x1_0000_0000))
#: Loudest sample: whole numbers of 16 bits, kept as fractions, reach half of it; 1 is usual.
_LOUDEST = 65_536.0
#: A file is damaged when more than one packet in ten does not decode.
_BAD_SHARE = 0.1


def read_image(path: str | Path) -> Tensor:
    """Read a picture as (3, h, w) uint8; upright as its Exif tells, transparency over white.

    Pixels of 16 bits, whole numbers or fractions are scaled to 8 bits.
    """
    with _naming(path), Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{path}: {image.width}x{image.height} pixels are too many")
        return pixels_of(image)


def pixels_of(image: Image.Image) -> Tensor:
    """Return what :func:`read_image` does, of a picture that is open."""
    upright = _in_eight_bits(ImageOps.exif_transpose(image))
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        over = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1).contiguous()


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Return a picture whose pixels have more bits with 8, where Pillow would cut off the rest.

    White is 65,535 in whole numbers, and the first of 1, 255 and 65,535 that no fraction exceeds;
    above that the largest value. Black is 0, or the smallest value below it.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not finite")
    largest, black = values.max(initial=0), values.min(initial=0)
    tops = (1, 255, 65_535) if image.mode == "F" else (65_535,)
    white = next((top for top in tops if largest <= top), largest)
    return Image.fromarray(np.round(255 * (values - black) / (white - black)).astype(np.uint8))


def read_frame(path: str | Path, fraction: float) -> Tensor:
    """Read the picture that a clip shows at a moment.

    Parameters
    ----------
    fraction : float
        The moment, 0 at the start of the clip and 1 at its end.

    Returns
    -------
    Tensor
        (3, h, w) uint8, upright as the clip's rotation tells.
    """
    with _naming(path), _open(path) as container:
        if not container.streams.video:
            raise DataError(f"{path}: no pictures in it")
        stream = container.streams.video[0]
        total = _samples(container)
        second = fraction * (_measured(path) if total is None else total) / audio.RATE
        start = (container.start_time or 0) / av.time_base
        # Without an index or a length, a seek leads anywhere.
        seek = second > 0 and total is not None and not _formats(container) & _UNSEEKABLE
        frame = _frame_at(container, stream, start + second, seek)
        if seek and (frame is None or (frame.time or 0) > start + second + 1e-6):
            with _open(path) as again:
                frame = _frame_at(again, again.streams.video[0], start + second, seek=False)
        if frame is None:
            raise DataError(f"{path}: no picture could be decoded")
        promised = _seconds(stream.duration, stream.time_base)
        shown = (frame.time or 0.0) - start
        if promised is not None and frame.time is not None and shown < min(second, promised) - 1:
            raise DataError(f"{path}: truncated, its pictures end after {shown:.1f} s")
        if frame.width * frame.height > MAX_PIXELS:
            raise DataError(f"{path}: {frame.width}x{frame.height} pixels are too many")
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def read_waveform(path: str | Path, fraction: float = 0.5, samples: int | None = None) -> Tensor:
    """Read sound as one channel at 16 kHz; several channels are averaged.

    Parameters
    ----------
    fraction : float
        Centre of the window, 0 at the clip's start and 1 at its end; the window is moved to lie
        inside the clip where it can.
    samples : int or None
        Length of the window; shorter sound is padded with silence on its right. None
        reads all of the sound.

    Returns
    -------
    Tensor
        (samples,) float32.
    """
    with _naming(path), _open(path) as container:
        if not container.streams.audio:
            raise DataError(f"{path}: no sound track")
        stream = container.streams.audio[0]
        total = _samples(container)
        end = round(MAX_SECONDS * audio.RATE)
        if samples is not None and total is not None:
            end = min(max(round(fraction * total) + samples - samples // 2, samples), end)
        waveform, whole = _decode_sound(container, stream, end)
        if not len(waveform):
            raise DataError(f"{path}: no sound could be decoded")
        promised = _seconds(stream.duration, stream.time_base)
        had = len(waveform) / audio.RATE
        exact = promised is not None and not _formats(container) & _ESTIMATED
        if whole and exact and had < 0.9 * promised - 0.5:
            raise DataError(f"{path}: truncated, {had:.1f} of {promised:.1f} s")
    return waveform if samples is None else cut(waveform, fraction, samples, total)


def read_recording(path: str | Path) -> tuple[Tensor, int]:
    """Read sound as one channel (s,) float32 at its own rate, and return that too."""
    with _naming(path), _open(path) as container:
        if not container.streams.audio:
            raise DataError(f"{path}: no sound track")
        stream = container.streams.audio[0]
        rate, pieces, had = stream.codec_context.sample_rate, [], 0
        if not _RATES[0] <= rate <= _RATES[1] or (rate % 1_000 and rate % 11_025):
            # An odd rate would make a resampling filter of gigabytes.
            raise DataError(f"{path}: {rate} samples per second cannot be right")
        for frame in _decode(container, stream):
            pieces.append(_mono(frame))
            had += len(pieces[-1])
            if had >= MAX_SECONDS * rate:
                break
        waveform = torch.from_numpy(np.concatenate([*pieces, np.empty(0, np.float32)]))
        if not len(waveform) or not waveform.abs().max() <= _LOUDEST:
            raise DataError(f"{path}: no sound could be decoded, or louder than any is")
    return waveform, rate


def resample(waveform: Tensor, rate: int) -> Tensor:
    """Return a waveform (s,) of so many samples a second as :func:`read_waveform` resamples it."""
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=audio.RATE)
    pieces = _resample(resampler, [waveform.float().numpy()], rate) if len(waveform) else []
    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)] if pieces else []
    return torch.from_numpy(np.concatenate([*pieces, np.empty(0, np.float32)]))


def cut(waveform: Tensor, fraction: float, samples: int, total: int | None) -> Tensor:
    """Return the window of :func:`read_waveform`, of a waveform (s,) that begins with its clip.

    ``total`` is the clip's length in samples, None where that is the waveform's.
    """
    centre = round(fraction * (len(waveform) if total is None else total))
    return audio.fit(waveform, samples, centre - samples // 2)


def length(path: str | Path) -> int | None:
    """Return a clip's length in samples at 16 kHz as its header states it, None if it does not."""
    with _naming(path), _open(path) as container:
        return _samples(container)


def _measured(path: str | Path) -> int:
    """Return the length in samples of a clip whose header states none: all of it is walked over."""
    end = 0.0
    with _open(path) as container:
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        start = (container.start_time or 0) / av.time_base
    return round((end - start) * audio.RATE)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turn every fault of decoding into a DataError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it then reads or refuses
            yield
    except DataError as error:
        error.file = str(path)
        raise
    except Exception as error:
        # Decoders meet arbitrary bytes here: SyntaxError, struct.error, IndexError, … all happen.
        absent = isinstance(error, FileNotFoundError)
        reason = str(error).replace(f"file:{path}", "").replace(str(path), "").strip(" :'")
        what = f"cannot be read: {reason or type(error).__name__}"
        fault = DataError(f"{path}: {'no such file' if absent else what}")
        fault.file = str(path)
        raise fault from error


def _open(path: str | Path) -> av.container.InputContainer:
    file = Path(path)
    size = file.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty")
    promised = _riff_size(file)
    if size < 0.95 * promised:
        raise DataError(f"{path}: truncated, {size} of {promised} bytes")
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    container = av.open(f"file:{file}", options=options, metadata_errors="ignore")
    for stream in (*container.streams.video, *container.streams.audio):
        # One thread: a machine hosts many clients, and loader processes decode side by side.
        stream.codec_context.thread_count = 1
    return container


def _riff_size(file: Path) -> int:
    """Return the bytes that a wav or avi header promises (FFmpeg forgets them), 0 for none."""
    with file.open("rb") as opened:
        head = opened.read(8)
    size = int.from_bytes(head[4:8], "little") if head[:4] == b"RIFF" else 0
    return 0 if any(low <= size < high for low, high in _ENDLESS) else size


def _formats(container: av.container.InputContainer) -> set[str]:
    return set(container.format.name.split(","))


def _seconds(duration: int | None, base: object) -> float | None:
    return None if duration is None or duration <= 0 or not base else float(duration * base)


def _samples(container: av.container.InputContainer) -> int | None:
    duration = container.duration
    if duration is None or duration <= 0:
        return None
    return round(duration / av.time_base * audio.RATE)


def _decode(
    container: av.container.InputContainer, stream: av.stream.Stream, wanted: float = 0.0
) -> Iterator:
    """Decode frame after frame; a few damaged packets are passed over.

    Pictures that no other is made from are left out until half a second before ``wanted``.
    """
    codec, far = stream.codec_context, wanted > 0.5
    good = bad = 0
    for packet in _packets_near(container.demux(stream), wanted):
        if far:
            far = packet.pts is not None and packet.pts * packet.time_base < wanted - 0.5
            codec.skip_frame = "NONREF" if far else "DEFAULT"
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            bad += 1
            if bad > 10 and bad > _BAD_SHARE * (good + bad):
                raise DataError(f"{container.name}: damaged: {error.strerror}") from error
            continue
        good += 1
        yield from frames
    if bad > 1 and bad > _BAD_SHARE * (good + bad):
        raise DataError(f"{container.name}: damaged, {bad} of {good + bad} packets do not decode")


def _packets_near(packets: Iterable[av.Packet], wanted: float) -> Iterator[av.Packet]:
    """Yield packets from the last key picture not after ``wanted`` on: none before is needed."""
    held: list[av.Packet] = []
    near = wanted <= 0
    for packet in packets:
        after = packet.pts is not None and packet.pts * packet.time_base > wanted
        if not near and packet.is_keyframe and not after:
            held = []
        held.append(packet)
        near = near or after
        if near:
            yield from held
            held = []
    yield from held


def _frame_at(
    container: av.container.InputContainer, stream: av.stream.Stream, second: float, seek: bool
) -> av.VideoFrame | None:
    """Return the last frame not after ``second``, else the nearest, None where none decodes."""
    if seek:
        try:
            container.seek(int(second * av.time_base), backward=True, any_frame=False)
        except av.FFmpegError:
            return None
    shown = None
    for count, frame in enumerate(_decode(container, stream, second)):
        if frame.time is None or shown is None or frame.time <= second + 1e-6:
            shown = frame
        if frame.time is None or frame.time >= second or count >= MAX_FRAMES:
            break
    return shown


def _decode_sound(
    container: av.container.InputContainer, stream: av.stream.Stream, end: int
) -> tuple[Tensor, bool]:
    """Return at least ``end`` samples of the waveform (s,), and whether the sound ended first."""
    own = stream.codec_context.sample_rate
    if not _RATES[0] <= own <= _RATES[1]:
        raise DataError(f"{container.name}: {own} samples per second cannot be right")
    # FFmpeg's resampler takes any rate; torchaudio's makes a filter of gigabytes for an odd one.
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=audio.RATE)
    decoded, waiting, resampled, had, ended = [], 0, [], 0, True
    for frame in _decode(container, stream):
        if frame.sample_rate != own:
            raise DataError(f"{container.name}: its sampling rate changes")
        decoded.append(_mono(frame))
        if not np.abs(decoded[-1]).max(initial=0) <= _LOUDEST:  # nor is it where that is NaN
            raise DataError(f"{container.name}: its sound is not finite, or louder than any is")
        waiting += frame.samples
        if waiting < own:
            continue
        # A second at once: a call for each of the codec's small frames takes longer than decoding.
        resampled += _resample(resampler, decoded, own)
        had = sum(map(len, resampled))
        decoded, waiting = [], 0
        if had >= end:
            ended = False
            break
    if ended and (decoded or resampled):
        resampled += _resample(resampler, decoded, own)
        resampled += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    waveform = np.concatenate([*resampled, np.empty(0, np.float32)])
    return torch.from_numpy(waveform), ended


def _mono(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Return the mean of the channels (s,), -1..1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "u":
        return (values.mean(axis=0, dtype=np.float32) - 128) / 128
    scale = 1 if values.dtype.kind == "f" else -float(np.iinfo(values.dtype).min)
    return values.mean(axis=0, dtype=np.float32) / np.float32(scale)


def _resample(
    resampler: av.AudioResampler, pieces: list[NDArray[np.float32]], rate: int
) -> list[NDArray[np.float32]]:
    if not pieces:
        return []
    joined = np.ascontiguousarray(np.concatenate(pieces)[None])
    frame = av.AudioFrame.from_ndarray(joined, format="fltp", layout="mono")
    frame.sample_rate = rate
    return [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
