"""`drilled_training.py` under the agent, with one rank that differs from the others.

ODD_RANK says which; ODD_HOW: ``unwatched`` (it has no agent), or the seconds by which its wall clock is ahead.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sosa_stream.agent.runner import main

if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["ODD_RANK"]:
        how = os.environ["ODD_HOW"]
        if how == "unwatched":
            os.environ["SOSA_DISABLE"] = "1"
        else:
            seconds, now = float(how), time.time
            time.time = lambda: now() + seconds
            time.time_ns = lambda: int(time.time() * 1e9)
    sys.exit(main([str(Path(__file__).with_name("drilled_training.py")), *sys.argv[1:]]))
