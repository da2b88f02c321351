"""The command line whose clients meet faults, each once in a run; the toys are there too.

``MPSL_TEST_FAULTS`` lists them, one a line, as "kind client message step": *kill 3 loss 10* kills
the process of client 3 when the server asks for its loss of step 10, or first after that. The
message ``backward`` is the client's part of it. What has struck leaves a file in the folder
``MPSL_TEST_STRUCK``, so that a process that is started again does not meet it again.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

from mpsl_dist.__main__ import main
from mpsl_dist.actors.client import Client

#: Where a client sends numbers; elsewhere "nan" means that its memory is spoiled.
SENT = ("tokenize", "loss", "tokenizer_weights", "take_gradients")


def fail() -> None:
    raise OSError("clip_0042.mp4: truncated")


def send(number: signal.Signals) -> None:
    """Signal this process; a thread may run on for a while, but answers nothing more."""
    os.kill(os.getpid(), number)
    time.sleep(3600)


#: What happens to a client; "nan" spoils its numbers instead.
STRIKES: dict[str, Callable[[], None]] = {
    "kill": lambda: send(signal.SIGKILL),
    "stop": lambda: send(signal.SIGSTOP),
    "slow": lambda: time.sleep(3600),
    "exception": fail,
}


@dataclass(frozen=True)
class Fault:
    kind: str
    client: int
    message: str
    step: int

    def __str__(self) -> str:
        return f"{self.kind} {self.client} {self.message} {self.step}"

    @property
    def asked(self) -> str:
        """The method of the client that it strikes in."""
        if self.message == "backward":  # a loss is where a client can spoil a gradient
            return "loss" if self.kind == "nan" else "tokenize"
        return self.message

    def struck(self) -> bool:
        """Whether it strikes now, for the first time."""
        try:
            (Path(os.environ["MPSL_TEST_STRUCK"]) / str(self)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def read(text: str) -> list[Fault]:
    faults = []
    for line in text.splitlines():
        kind, client, message, step = line.split()
        faults.append(Fault(kind, int(client), message, int(step)))
    return faults


def install(faults: list[Fault]) -> None:
    """Stand before the methods of every client of this process."""
    first: dict[int, int] = defaultdict(int)
    now: dict[int, int] = defaultdict(lambda: -1)

    def before(message: str) -> Callable[..., Any]:
        method = getattr(Client, message)

        @functools.wraps(method)
        def ask(self: Client, *words: Any) -> Any:
            if message == "begin_epoch":
                first[self.number] = words[0] * len(words[1])
            if message == "tokenize":
                now[self.number] = first[self.number] + words[0]
            for fault in faults:
                here = (fault.client, fault.asked) == (self.number, message)
                if here and fault.step <= now[self.number] and fault.struck():
                    return meet(fault, self, functools.partial(method, self), *words)
            return method(self, *words)

        return ask

    for message in {"begin_epoch", "tokenize", *(fault.asked for fault in faults)}:
        setattr(Client, message, before(message))


def meet(fault: Fault, client: Client, answer: Callable[..., Any], *words: Any) -> Any:
    """Answer a message with a fault."""
    if fault.kind != "nan":
        if fault.message != "backward":
            STRIKES[fault.kind]()
            return answer(*words)
        smashed = answer(*words)
        smashed[0].register_hook(lambda gradient: STRIKES[fault.kind]())
        return smashed
    if fault.message == "backward":
        # The square root's slope at zero is infinite: a finite loss, no finite gradient.
        return answer(*words) + (words[1] * 0).abs().sqrt().sum()
    if fault.message == "step":
        return answer(words[0], {p: gradient * math.nan for p, gradient in words[1].items()})
    if fault.message in SENT:
        return spoiled(answer(*words))
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.fill_(math.nan)
    return answer(*words)


def spoiled(value: Any) -> Any:
    if isinstance(value, list):
        return [spoiled(each) for each in value]
    if isinstance(value, dict):
        return {key: spoiled(each) for key, each in value.items()}
    return value * math.nan


if __name__ == "__main__":
    install(read(os.environ["MPSL_TEST_FAULTS"]))
    sys.exit(main())
