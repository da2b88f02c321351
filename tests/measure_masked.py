"""What a masked sum costs: CPU seconds of a client and of the server, and bytes of a client.

    python tests/measure_masked.py

All clients are in this process; seconds are of the processor, the least of ``--times`` sums.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from local_fleet import LocalSplit

from mpsl_dist.actors.client import Client
from mpsl_dist.actors.references import Local
from mpsl_dist.config import Faults
from mpsl_dist.methods.masked import Masks, masked_sum

#: Clients, and trained tokenizer parameters: the quickstart's, mnist-fsdd's, ViT-B/16's on COCO-QA.
CASES = ((10, 2_176), (100, 2_176), (10, 22_976), (100, 22_976), (10, 743_424), (25, 743_424))


def clients_of(number: int, parameters: int) -> LocalSplit:
    """A link to clients that have kept a gradient each."""
    clients = [
        Client(n, None, None, Local(nn.Identity()), None, "early", None) for n in range(number)
    ]
    for client in clients:
        client._accumulated = torch.randn(parameters)
    link = LocalSplit(clients, Faults())
    link.masks = Masks({"w": torch.zeros(1)})
    return link


def measure(number: int, parameters: int, times: int) -> str:
    """Return the row of a case."""
    link, spent = clients_of(number, parameters), [0.0]
    serve = link.fleet.host.serve

    def timed(*words: object) -> dict:
        begin = time.process_time()
        answers = serve(*words)
        spent[-1] += time.process_time() - begin
        return answers

    link.fleet.host.serve = timed
    whole = []
    for _ in range(times):
        begin = time.process_time()
        masked_sum(link, link.masks, "gradients", dict.fromkeys(range(number), 1.0), "", "sync_up")
        whole.append(time.process_time() - begin)
        spent.append(0.0)
    at = whole.index(min(whole))
    sent = {kind: counts[1] // times for kind, counts in link.traffic.bytes.items()}
    up, down = sent["sync_up"] + sent["sync_keys_up"], sent["sync_keys_down"]
    client, server = spent[at] / number * 1e3, (whole[at] - spent[at]) * 1e3
    row = f"{number:7} {parameters:10} {client:14.2f} {server:10.2f} "
    return row + f"{4 * parameters:10} {up:10} {down:10}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("clients parameters  a client, ms server, ms   plain up  masked up  keys down")
    for number, parameters in CASES:
        print(measure(number, parameters, options.times), flush=True)


if __name__ == "__main__":
    main()
