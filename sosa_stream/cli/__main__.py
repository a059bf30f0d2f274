"""``python -m sosa_stream.cli``: the same as ``sosa``."""

from __future__ import annotations

import sys

from sosa_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
