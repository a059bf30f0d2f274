"""``torchrun … -m sosa_stream.agent train.py``."""

from __future__ import annotations

import sys

from sosa_stream.agent.runner import main

if __name__ == "__main__":
    sys.exit(main())
