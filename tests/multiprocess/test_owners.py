"""Owners of their data on one machine: started by one command, or each by its own line."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from conftest import Launch, World, until
from federation import SMALL, line_of, make_sites, write_experiment
from media_files import write_csv
from test_lost_workers import hosting

from mpsl_dist.runtime import network


def ranks(folder: Path, launch: Launch, *words: str, server: Path | None = None) -> list[World]:
    """Start every rank by its line of the page, with an output of its own; the server first."""
    write_experiment(folder)
    address, worlds = network.own_loopback(str(folder)), []
    for rank, name in enumerate(("server", "north", "south")):
        variables, line = line_of(rank, folder / name / "birds.csv")
        variables |= {"MASTER_ADDR": address}
        own = [f"output={folder / f'host{rank}'}"]
        if rank == 0 and server:
            own.append(f"data.root={server}")
        command = [sys.executable, *line, *SMALL, *own, *words]
        worlds.append(launch(command, **variables))
    return worlds


def test_owners_that_write_a_label_differently_train_nothing(
    launch: Launch, tmp_path: Path
) -> None:
    make_sites(tmp_path, label="Robin")
    for rank, name in enumerate(("north", "south"), 1):
        (tmp_path / name).rename(tmp_path / f"host-{rank}")
    path = write_experiment(tmp_path)
    text = [line for line in path.read_text().splitlines() if "classes:" not in line]
    path.write_text("\n".join(text))
    root = f"data.root={tmp_path}/host-{{rank}}/birds.csv"
    line = ["-m", "mpsl_dist", "train", str(path), *SMALL]
    shared = launch([sys.executable, *line, f"data.root={tmp_path}/host-1/birds.csv"])
    status, output = shared.finish(240)
    assert status == 2 and "2 processes of this host would read the same data.root" in output
    status, output = launch([sys.executable, *line, root]).finish(240)
    assert status == 2 and "Traceback" not in output, output
    said = f"error: worker2 on {socket.gethostname()} disagrees: the label 'Robin' there is 'robin'"
    assert said in output
    assert not (tmp_path / "runs" / "birds" / "metrics.jsonl").exists()


def test_a_host_with_other_data_is_refused_on_all_hosts(launch: Launch, tmp_path: Path) -> None:
    _, (_, south) = make_sites(tmp_path)
    rows = [["south-0.png", "owl", split] for split in ("train", "test")]
    write_csv(south, ["image", "label", "split"], rows)
    ended = [world.finish(240) for world in ranks(tmp_path, launch)]
    assert [status for status, _ in ended] == [2, 2, 2], ended
    (_, server), (_, north), (_, other) = ended
    why = f"data.modalities: text needs a column text in {south}"
    for output in (server, other):
        assert f"error: worker2 on {socket.gethostname()}: {why}" in output, output
    assert "the server says why" in north and "text" not in north.split("error:")[1]


def test_each_host_keeps_what_is_its_own_and_is_named_if_it_lost_it(
    launch: Launch, tmp_path: Path
) -> None:
    everything, _ = make_sites(tmp_path)
    words = ["data.test_at=server", "training.epochs=3", "checkpoint.keep=1"]
    ended = [world.finish(240) for world in ranks(tmp_path, launch, *words, server=everything)]
    assert [status for status, _ in ended] == [0, 0, 0], ended
    home = [tmp_path / f"host{rank}" / "birds" for rank in range(3)]
    found = json.loads((home[0] / "summary.json").read_text())
    assert found["status"] == "completed" and 0 <= found["test"]["accuracy"] <= 1
    (part,) = home[2].rglob("client-*.pt")
    assert part == home[2] / "checkpoints" / "step-00000009" / "client-0001.pt"
    part.unlink()
    words = [*words, "training.epochs=4", "--resume"]
    ended = [world.finish(240) for world in ranks(tmp_path, launch, *words, server=everything)]
    assert ended[0][0] == 2, ended
    assert f"(client 1): {part}: No such file" in ended[0][1]
    assert "worker2" in ended[0][1] and "no checkpoint is left" in ended[0][1]


def test_a_worker_that_comes_back_has_its_own_data_again(launch: Launch, tmp_path: Path) -> None:
    make_sites(tmp_path)
    words = ["training.epochs=1000", "checkpoint.every_epochs=0", "faults.rejoin=now"]
    worlds = ranks(tmp_path, launch, *words)
    metrics = tmp_path / "host0" / "birds" / "metrics.jsonl"

    def line(key: str) -> int:
        written = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        return max((json.loads(one).get(key, 0) for one in written[-5:]), default=0)

    until(lambda: line("step") > 2, 120, "steps")
    os.kill(hosting(worlds[2], 2), signal.SIGKILL)
    until(lambda: line("clients_returned") == 1, 120, "the return")
    before = line("step")
    until(lambda: line("step") > before + 2, 60, "steps with it")
    worlds[0].process.send_signal(signal.SIGTERM)
    ended = [world.finish(120) for world in worlds]
    summary = json.loads((metrics.parent / "summary.json").read_text())
    assert (summary["status"], summary["clients_lost"], summary["clients_returned"]) == (
        "stopped",
        0,
        1,
    ), ended
