"""Peak memory and seconds of an encoder's forward and backward: ``measure_encoder.py [WORD ...]``.

Words are ``checkpoint`` and ``bf16``. ViT-S, 16 samples of 197 tokens, one thread. glibc keeps what
is freed in small pieces, so run it with ``MALLOC_MMAP_THRESHOLD_=262144``.
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from mpsl_dist.models.server_model import SIZES, build_encoder


def main(words: list[str]) -> None:
    """Print both, the best of three seconds."""
    torch.set_num_threads(1)
    encoder = build_encoder(*SIZES["S"])
    encoder.checkpoint_blocks = "checkpoint" in words
    encoder.autocast = "bf16" if "bf16" in words else None
    tokens_bld = torch.randn(16, 197, SIZES["S"][0], requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        started = time.process_time()
        encoder(tokens_bld).sum().backward()
        seconds.append(time.process_time() - started)
        encoder.zero_grad()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{' '.join(words) or 'plain'}: {peak:.0f} MiB, {min(seconds):.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
