"""``sosa diagnose``: a script runs under the agent in a process of its own, and a folder tells what happened.

| module | role |
|---|---|
| `supervisor` | of each rank: starts the training process, hands signals on, and outlives it |
| `watch` | rank 0's: follows the recording, prints lines, asks for the `stop` |
| `lines` | the lines, from what the recording brings; pure |
| `__main__`, `training` | in the training process: the agent's runner, with epochs and the best model |
| `epochs`, `best_model` | counts and ends epochs; keeps the weights of the lowest smoothed loss |
"""

from __future__ import annotations

BEST_MODEL = "best_model.pt"
