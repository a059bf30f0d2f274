"""``python -m sosa_stream.diagnose OUT EPOCHS NOTICE PARENT SCRIPT…``: what `supervisor` starts; not for people."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sosa_stream.diagnose.training import die_with, run

if __name__ == "__main__":
    out, num_epochs, notice, parent, *words = sys.argv[1:]
    die_with(int(parent))
    rank = int(os.environ.get("RANK", "0"))
    sys.exit(run(words, rank=rank, out=Path(out), num_epochs=int(num_epochs), notice=int(notice)))
