"""A process that fills the number of a missing worker and hosts nobody.

Started by :mod:`mpsl_dist.runtime.generations` on the server's host.
"""

from __future__ import annotations

import json
import os
import sys

from mpsl_dist.errors import RemoteError
from mpsl_dist.runtime import process
from mpsl_dist.runtime.environment import Environment
from mpsl_dist.runtime.world import Place, World, await_word


def main(words: str) -> None:
    """Stand in until the world ends or is made anew.

    Parameters
    ----------
    words : str
        JSON: the ``place`` of a World and its ``generation``.
    """
    process.end_with_parent(os.getppid())
    process.leave_stopping_to_server()
    told = json.loads(words)
    launched = Environment(**told["place"].pop("launched"))
    try:
        world = World(Place(launched, **told["place"]), told["generation"])
        world.start()
    except RemoteError:
        process.leave(1)  # whoever fails to meet is left out, and the server says so
    await_word()
    process.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
