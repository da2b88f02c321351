"""Downloads, against a server on loopback that drops connections and serves wrong bytes."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mpsl_dist.data import DataError, catalog
from mpsl_dist.data.catalog import Archive
from mpsl_dist.data.fetch import archives, download


@dataclass
class Shop:
    """What the server does."""

    address: str = ""
    content: bytes = b""
    #: Bytes after which each of the next connections ends.
    drops: list[int] = field(default_factory=list)
    #: Answers of the next requests instead of the content.
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    tag: str = '"one"'
    requests: list[str] = field(default_factory=list)
    sent: int = 0


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A server on loopback."""
    state = Shop()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            state.requests.append(asked)
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = 0
            if asked and state.ranges and self.headers.get("If-Range") == state.tag:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
            body = state.content[start:]
            self.send_response(206 if start else 200)
            if start:
                total = len(state.content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("ETag", state.tag)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state.drops:
                body = body[: state.drops.pop(0)]
            self.wfile.write(body)
            state.sent += len(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def _zip(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return buffer.getvalue()


def _tar(entries: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CONTENT = _zip({"train/a.txt": b"a" * 100_000, "b.txt": bytes(range(256)) * 400})
SHA = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def _get(shop: Shop, root: Path, checksum: str | None = SHA, **options) -> str:
    archive = Archive(f"{shop.address}/set.zip", "set", checksum)
    return download.get(archive, root, wait=0.001, timeout=5, **options)


def test_downloads_and_unpacks_once(shop: Shop, tmp_path: Path) -> None:
    shop.content = CONTENT
    assert "2 files" in _get(shop, tmp_path)
    assert (tmp_path / "set/train/a.txt").read_bytes() == b"a" * 100_000
    assert "there already" in _get(shop, tmp_path)
    assert len(shop.requests) == 1
    assert not list((tmp_path / ".downloads").glob("set*")), "nothing left behind"


def test_continues_where_the_connection_dropped(shop: Shop, tmp_path: Path) -> None:
    shop.content, shop.drops = CONTENT, [30_000, 20_000, 0, 10]
    _get(shop, tmp_path)
    assert (tmp_path / "set/b.txt").stat().st_size == 102_400
    assert shop.requests[:3] == ["", "bytes=30000-", "bytes=50000-"]
    assert shop.sent == len(CONTENT), "no byte twice"


def test_continues_in_a_later_process(shop: Shop, tmp_path: Path) -> None:
    shop.content, shop.drops = CONTENT, [30_000]
    shop.statuses = []
    part = tmp_path / ".downloads/set.zip.part"

    class Killed(BaseException):
        pass

    def kill(_: float) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(download.time, "sleep", kill)
        _get(shop, tmp_path)
    assert part.stat().st_size == 30_000
    _get(shop, tmp_path)
    assert shop.requests == ["", "bytes=30000-"] and not part.exists()


@pytest.mark.parametrize("change", ["tag", "ranges"])
def test_starts_anew_when_the_file_changed_or_ranges_are_ignored(
    shop: Shop, tmp_path: Path, change: str
) -> None:
    shop.content, shop.drops = CONTENT, [30_000]
    if change == "ranges":
        shop.ranges = False
    else:
        # The first bytes are of another version: to go on with them would mix the two.
        part = tmp_path / ".downloads/set.zip.part"
        part.parent.mkdir(parents=True)
        part.write_bytes(b"x" * 1_000)
        part.with_name(f"{part.name}.tag").write_text('"old"')
    _get(shop, tmp_path)
    assert (tmp_path / "set/train/a.txt").read_bytes() == b"a" * 100_000


def test_wrong_bytes_are_removed_and_refused(shop: Shop, tmp_path: Path) -> None:
    shop.content = CONTENT[:-5] + b"wrong"
    with pytest.raises(DataError, match="sha256"):
        _get(shop, tmp_path)
    assert not (tmp_path / "set").exists()
    assert not list((tmp_path / ".downloads").glob("set*"))
    shop.content = CONTENT
    assert "2 files" in _get(shop, tmp_path)


def test_without_a_published_checksum_the_first_one_counts(shop: Shop, tmp_path: Path) -> None:
    shop.content = CONTENT
    _get(shop, tmp_path, checksum=None)
    record = json.loads((tmp_path / "downloads.json").read_text())
    (known,) = record.values()
    assert known["checksum"] == SHA
    known["unpacked"] = False
    (tmp_path / "downloads.json").write_text(json.dumps(record))
    shop.content = _zip({"a.txt": b"another"})
    with pytest.raises(DataError, match="expected"):
        _get(shop, tmp_path, checksum=None)


def test_faults_of_the_server(shop: Shop, tmp_path: Path) -> None:
    shop.content, shop.statuses = CONTENT, [503, 429, 500]
    _get(shop, tmp_path)
    shop.statuses = [404]
    with pytest.raises(DataError, match="404"):
        _get(shop, tmp_path / "other")
    shop.drops = [0] * 10
    with pytest.raises(DataError, match=r"gave up after 3 attempts.*early"):
        _get(shop, tmp_path / "third", attempts=3)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with download._locked(tmp_path), pytest.raises(DataError, match="another download"):
        download.get(Archive("http://127.0.0.1:9/a.zip", "a"), tmp_path)


def test_catalog(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t4sa\.it"):
        download.download("t4sa", tmp_path)
    with pytest.raises(DataError, match="CVD"):
        download.download("kinetics-sounds", tmp_path)
    with pytest.raises(DataError, match="nothing"):
        download.download("nothing", tmp_path)
    with pytest.raises(DataError, match="only http"):
        download.get(Archive("file:///etc/passwd", "x"), tmp_path)
    for name in ("coco-qa", "ms-coco", "flickr30k", "meld", "ucf101"):
        assert catalog.DATASETS[name].archives
        for archive in catalog.DATASETS[name].archives:
            assert archive.url.startswith(("http://", "https://"))
            assert archive.checksum is None or archive.checksum.startswith(("md5:", "sha256:"))


def test_inner_archives_are_unpacked(tmp_path: Path) -> None:
    inner = _tar({"train_splits/dia0_utt0.mp4": b"clip", "train_splits/._dia0_utt0.mp4": b"x"})
    outer = tmp_path / "outer.tar.gz"
    outer.write_bytes(_tar({"MELD.Raw/train.tar.gz": inner, "MELD.Raw/train_sent_emo.csv": b"a"}))
    assert archives.unpack(outer, tmp_path / "meld") == 2
    written = sorted(p.name for p in (tmp_path / "meld").rglob("*") if p.is_file())
    assert written == ["dia0_utt0.mp4", "train_sent_emo.csv"]


def _hostile(outside: Path) -> dict[str, bytes]:
    """Archives that try to write to ``outside``, or are none."""
    absolute = str(outside / "out.txt")
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(link)
    linked = zipfile.ZipInfo("link")
    linked.external_attr = (stat.S_IFLNK | 0o777) << 16
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr(linked, "/etc")
    return {
        "up.zip": _zip({"../out.txt": b"x"}),
        "deep.zip": _zip({"a/../../out.txt": b"x"}),
        "absolute.zip": _zip({absolute: b"x"}),
        "up.tar": _tar({"../out.txt": b"x"}, "w"),
        "absolute.tar.gz": _tar({absolute: b"x"}),
        "link.tar": buffer.getvalue(),
        "link.zip": zipped.getvalue(),
        "noise.zip": b"no archive at all",
        "empty.tar": b"",
        "cut.zip": CONTENT[:-30],
        "cut.tar.gz": _tar({"a.txt": bytes(range(256)) * 1000})[:200],
    }


@pytest.mark.parametrize("name", sorted(_hostile(Path())))
def test_hostile_and_damaged_archives_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(_hostile(tmp_path)[name])
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        archives.unpack(path, tmp_path / "inside")
    assert not list(tmp_path.glob("*.txt"))


def test_a_link_in_the_folder_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside/way").symlink_to(tmp_path / "outside")
    (tmp_path / "a.zip").write_bytes(_zip({"way/a.txt": b"x"}))
    with pytest.raises(DataError, match="leads out"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "inside")
    assert not list((tmp_path / "outside").iterdir())


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.zip").write_bytes(CONTENT)
    usage = type("Usage", (), {"free": 150_000})()
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="larger than what the disk"):
        archives.unpack(tmp_path / "a.zip", tmp_path / "set")


def test_rar_without_a_program_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="unrar, bsdtar, 7z"):
        archives.unpack(tmp_path / "UCF101.rar", tmp_path / "ucf101")
