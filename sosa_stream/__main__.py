"""``python -m sosa_stream``, where the command ``sosa`` is not on the path."""

from __future__ import annotations

import sys

from sosa_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
