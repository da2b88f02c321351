"""The command line with the toy datasets known to every rank."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys

from mpsl_dist.__main__ import main

if __name__ == "__main__":
    toys.register()
    sys.exit(main())
