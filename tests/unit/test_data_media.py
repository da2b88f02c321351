"""Decoding: every usual format is read, every fault is an error that names the file."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import DATA, needs, write_clip, write_picture, write_sound
from PIL import Image

from mpsl_dist.data import DataError
from mpsl_dist.data.decode import audio, media


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_picture_formats(tmp_path: Path, suffix: str) -> None:
    pixels = media.read_image(write_picture(tmp_path / f"picture.{suffix}", 120))
    assert pixels.shape == (3, 48, 64) and pixels.dtype == torch.uint8
    assert abs(int(pixels[0, 20, 60]) - 120) <= 3 and abs(int(pixels[0, 20, 5]) - 100) <= 3


def test_transparent_is_white_and_exif_turns(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (media.read_image(tmp_path / "clear.png") == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4), 7).save(tmp_path / "turned.jpg", exif=exif)
    assert media.read_image(tmp_path / "turned.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey16.png", np.array([[0, 20_000, 65_535]], np.uint16)),
        ("grey16.tif", np.array([[0, 20_000, 65_535]], np.uint16)),
        ("whole32.tif", np.array([[0, 20_000, 65_535]], np.int32)),
        ("fraction.tif", np.array([[0, 20_000 / 65_535, 1]], np.float32)),
        ("fraction255.tif", np.array([[0, 77.8, 255]], np.float32)),
        ("wide.tif", np.array([[0, 305_180, 1_000_000]], np.int32)),
        ("signed.tif", np.array([[-1, -0.3896, 1]], np.float32)),
    ],
)
def test_pixels_of_more_than_eight_bits_are_scaled(
    tmp_path: Path, name: str, pixels: np.ndarray
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    assert media.read_image(tmp_path / name)[:, 0].tolist() == [[0, 78, 255]] * 3


def test_pixels_that_are_no_numbers_are_a_fault(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(DataError, match=r"nan\.tif: .*not finite"):
        media.read_image(tmp_path / "nan.tif")


@pytest.mark.parametrize(
    ("name", "codec", "container_format", "rate", "channels"),
    [
        ("a.wav", "pcm_s16le", None, 8_000, 1),
        ("a.wav", "pcm_f32le", None, 44_100, 2),
        ("a.wav", "pcm_u8", None, 16_000, 2),
        ("a.wav", "pcm_s24le", None, 22_050, 2),
        ("a.flac", "flac", None, 16_000, 1),
        ("a.ogg", "libopus", None, 48_000, 2),
        ("a.mp3", "libmp3lame", None, 44_100, 2),
        ("an_mp3_under_the_name.wav", "libmp3lame", "mp3", 16_000, 1),
        ("a.m4a", "aac", "mp4", 44_100, 2),
    ],
)
def test_sound_formats(
    tmp_path: Path, name: str, codec: str, container_format: str | None, rate: int, channels: int
) -> None:
    path = write_sound(
        tmp_path / name,
        codec=codec,
        container_format=container_format,
        rate=rate,
        channels=channels,
    )
    waveform = media.read_waveform(path)
    assert waveform.dtype == torch.float32 and abs(len(waveform) - audio.RATE) < 2_000
    middle = waveform[6_000:10_000]
    spectrum = torch.fft.rfft(middle).abs()
    assert abs(int(spectrum.argmax()) * audio.RATE / len(middle) - 440) < 8
    # The tone's height is .05 + .9 t, in every format and number of channels.
    assert abs(middle.abs().max() - 0.6) < 0.1


@pytest.mark.parametrize(("name", "sound"), [("clip.mp4", "aac"), ("clip.avi", "libmp3lame")])
def test_clip_gives_the_frame_and_the_sound_of_a_moment(
    tmp_path: Path, name: str, sound: str
) -> None:
    path = write_clip(tmp_path / name, 2.0, sound=sound)
    shades = [float(media.read_frame(path, f).float().mean()) for f in (0.0, 0.5, 1.0)]
    assert shades[0] < 20 and abs(shades[1] - 127) < 25 and shades[2] > 235
    # At 1.05 s the frame of 1.0 s is shown, the eleventh of twenty.
    assert abs(float(media.read_frame(path, 0.525).float().mean()) - 255 * 10 / 19) < 6
    early, late = (media.read_waveform(path, f, 1_600).abs().max() for f in (0.2, 0.8))
    assert 0.1 < early < 0.35 and 0.6 < late < 1.0
    assert media.read_waveform(path, 0.5, 5 * audio.RATE).shape == (5 * audio.RATE,)


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [
        ("clip.ts", "mpeg2video", "mp2"),
        ("clip.ts", "libx264", "aac"),  # its only key picture is the first
        ("clip.flv", "libx264", "aac"),
        ("clip.mkv", "libx264", "aac"),
        ("live.mkv", "libx264", "aac"),
        ("live.webm", "libvpx", "libopus"),
    ],
)
def test_containers_without_an_index_or_a_length(
    tmp_path: Path, name: str, codec: str, sound: str
) -> None:
    path = write_clip(tmp_path / f"whole{Path(name).suffix}", 6.0, codec=codec, sound=sound)
    if name.startswith("live"):
        path = _stream(path, tmp_path / name)
        assert media.length(path) is None
    for fraction in (0.0, 0.3, 0.5, 0.9, 1.0):
        shade = float(media.read_frame(path, fraction).float().mean())
        assert abs(shade - 255 * fraction) < 15, fraction
    early, late = (media.read_waveform(path, f, 1_600).abs().max() for f in (0.1, 0.9))
    assert abs(early - 0.14) < 0.05 and abs(late - 0.86) < 0.1


def _stream(path: Path, target: Path) -> Path:
    """Copy a clip as it is written where nobody can go back to write its length and index."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    pipe = Pipe()
    pipe.seek = None
    form = "webm" if target.suffix == ".webm" else "matroska"
    with av.open(str(path)) as source, av.open(pipe, "w", form, options={"live": "1"}) as live:
        streams = [live.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                live.mux(packet)
    target.write_bytes(pipe.getvalue())
    return target


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((1, 0, 0, 1), "right"),
        ((0, 1, -1, 0), "bottom"),  # a phone held upright
        ((-1, 0, 0, -1), "left"),
        ((0, -1, 1, 0), "top"),
    ],
)
def test_clips_follow_their_rotation(tmp_path: Path, matrix: tuple[int, ...], bright: str) -> None:
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
    content = bytearray((tmp_path / "phone.mp4").read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (65_536 * value for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(content)
    frame = media.read_frame(tmp_path / "phone.mp4", 0.5).float().mean(0)
    assert frame.shape == ((32, 64) if bright in ("left", "right") else (64, 32))
    height, width = frame.shape
    edges = {
        "left": frame[:, : width // 4],
        "right": frame[:, -width // 4 :],
        "top": frame[: height // 4],
        "bottom": frame[-height // 4 :],
    }
    assert max(edges, key=lambda side: float(edges[side].mean())) == bright


def test_window_is_the_same_from_a_part_and_from_the_whole(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "long.flac", 6.0, codec="flac", rate=44_100, channels=2)
    whole, total = media.read_waveform(path), media.length(path)
    for fraction in (0.0, 0.3, 0.77, 1.0):
        part = media.read_waveform(path, fraction, 20_000)
        assert torch.allclose(part, media.cut(whole, fraction, 20_000, total), atol=1e-5)


def test_fbank_is_torchaudios() -> None:
    from torchaudio.compliance import kaldi

    waveforms = torch.randn(3, 8_000, generator=torch.Generator().manual_seed(0)) * 0.1
    waveforms[1, 3_000:] = 0
    ours = audio.fbank(waveforms, 40)
    for waveform, logmel in zip(waveforms, ours, strict=True):
        fitted = audio.fit(waveform, audio.samples_for(40))
        theirs = kaldi.fbank(
            (fitted - fitted.mean())[None],
            htk_compat=True,
            window_type="hanning",
            num_mel_bins=128,
            sample_frequency=16_000,
        )
        assert theirs.shape == (40, 128) and torch.allclose(logmel, theirs, atol=2e-3)


def test_fbank_places_a_tone(tmp_path: Path) -> None:
    waveform = media.read_waveform(write_sound(tmp_path / "tone.wav", 1.0))
    logmel = audio.fbank(waveform, 98)
    assert logmel.shape == (98, 128) and torch.isfinite(logmel).all()
    # 440 Hz lies in bin 24 of 128 mel bins over 20 Hz .. 8 kHz (mel = 1127 ln(1 + f / 700)).
    low, high, tone = (1127 * np.log1p(f / 700) for f in (20.0, 8000.0, 440.0))
    expected = (tone - low) / (high - low) * 129 - 1
    assert abs(int(logmel[50].argmax()) - expected) <= 1
    assert torch.equal(audio.fbank(waveform[:400], 98)[3:], audio.fbank(waveform[:400], 120)[3:98])
    silence = audio.fbank(torch.zeros(10), 5)
    assert torch.allclose(silence, torch.tensor(np.log(np.finfo(np.float32).eps)).float())


@pytest.mark.parametrize("samples", [100, 1_000, 5_000])
@pytest.mark.parametrize("start", [-50, 0, 300, 10_000])
def test_fit(samples: int, start: int) -> None:
    waveform = torch.arange(1_000.0) + 1
    fitted = audio.fit(waveform, samples, start)
    assert fitted.shape == (samples,)
    kept = fitted[fitted > 0]
    assert len(kept) == min(samples, 1_000) and torch.equal(kept.diff(), torch.ones(len(kept) - 1))


def _truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_faults_are_errors_that_name_the_file(tmp_path: Path) -> None:
    silent = write_clip(tmp_path / "silent.mp4", sound=None)
    with pytest.raises(DataError, match=r"silent\.mp4: no sound track"):
        media.read_waveform(silent)
    tone = write_sound(tmp_path / "tone.flac", codec="flac")
    with pytest.raises(DataError, match=r"tone\.flac: no pictures"):
        media.read_frame(tone, 0.5)
    _truncate(write_clip(tmp_path / "cut.mp4"), 0.6)
    _truncate(write_picture(tmp_path / "cut.jpg", size=(400, 300)), 0.6)
    _truncate(write_sound(tmp_path / "cut.wav", 5.0), 0.4)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "notes.mp4").write_bytes(b"not a clip at all, but words " * 50)
    readers = {
        "cut.mp4": lambda p: media.read_frame(p, 0.5),
        "cut.jpg": media.read_image,
        "cut.wav": media.read_waveform,
        "empty.mp4": media.read_waveform,
        "notes.mp4": media.read_waveform,
        "absent.png": media.read_image,
        "absent.wav": media.read_waveform,
    }
    for name, read in readers.items():
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read(tmp_path / name)


def test_truncated_behind_a_whole_header_is_noticed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "front.mp4", 8.0, options={"movflags": "faststart"})
    media.read_frame(path, 0.9)
    _truncate(path, 0.5)
    with pytest.raises(DataError, match="truncated"):
        media.read_frame(path, 0.95)
    with pytest.raises(DataError):
        media.read_waveform(path)


@pytest.mark.parametrize(
    ("riff", "sound"),
    [
        (0x7FFF_F024, 0x7FFF_F000),
        (0x8000_0024, 0x8000_0000),
        (0xFFFF_FFFF, 0xFFFF_FFFF),
        (0, 0),
    ],
)
def test_a_wav_written_to_a_pipe_is_read(tmp_path: Path, riff: int, sound: int) -> None:
    path = write_sound(tmp_path / "piped.wav", 2.0)
    expected = [media.read_waveform(path, f, 1_600) for f in (0.2, 0.8)]
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", riff)
    at = content.index(b"data")
    content[at + 4 : at + 8] = struct.pack("<I", sound)
    path.write_bytes(content)
    for fraction, waveform in zip((0.2, 0.8), expected, strict=True):
        assert torch.equal(media.read_waveform(path, fraction, 1_600), waveform)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e6])
def test_sound_that_is_no_sound_is_a_fault_of_its_file(tmp_path: Path, value: float) -> None:
    path = write_sound(tmp_path / "tone.wav", codec="pcm_f32le")
    content = bytearray(path.read_bytes())
    content[-8_000:-7_996] = struct.pack("<f", value)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tone\.wav: its sound is not finite"):
        media.read_waveform(path)


def test_any_sampling_rate_is_read_quickly(tmp_path: Path) -> None:
    begin = time.monotonic()
    for rate in (7_993, 44_101):
        waveform = media.read_waveform(write_sound(tmp_path / f"{rate}.wav", 1.0, rate=rate))
        assert abs(len(waveform) - audio.RATE) < 100
    assert time.monotonic() - begin < 5
    path = write_sound(tmp_path / "slow.wav", 1.0)
    content = bytearray(path.read_bytes())
    content[24:28] = (3).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="3 samples per second"):
        media.read_waveform(path)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    tone = write_sound(tmp_path / "secret.aac", codec="aac", container_format="adts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tone}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    (tmp_path / "list.wav").write_text("ffconcat version 1.0\nfile secret.aac\n")
    (tmp_path / "list.m3u8").write_text(playlist.replace(str(tone), "secret.aac"))
    for name in ("list.mp4", "list.wav", "list.m3u8"):
        with pytest.raises(DataError, match=name):
            media.read_waveform(tmp_path / name)


def test_huge_pictures_are_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match="huge"):
        media.read_image(tmp_path / "huge.png")


@needs("video", "ucf101/UCF-101")
def test_real_clips() -> None:
    for name, seconds in (("R6llTwEh07w.mp4", 10), ("SOX5yA1l24A.mp4", 11), ("audio_track.avi", 6)):
        path = DATA / "video" / name
        assert abs(media.length(path) / audio.RATE - seconds) < 1
        assert media.read_frame(path, 0.5).float().std() > 10
        waveform = media.read_waveform(path, 0.5, audio.samples_for(1024))
        assert len(waveform) == 164_080 and 0.001 < waveform.abs().mean() < 0.5
        assert not torch.equal(media.read_frame(path, 0.2), media.read_frame(path, 0.8))
    silent = next((DATA / "ucf101" / "UCF-101").rglob("*.avi"))
    assert media.read_frame(silent, 0.5).shape == (3, 240, 320)
    with pytest.raises(DataError, match="no sound track"):
        media.read_waveform(silent)
