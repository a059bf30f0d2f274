"""``python -m sosa_stream.doctor``: what `sosa doctor` starts."""

from __future__ import annotations

import sys

from sosa_stream.doctor.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
