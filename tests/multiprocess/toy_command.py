"""The command line where the toys can be imported: ``plugins: [toys]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mpsl_dist.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
