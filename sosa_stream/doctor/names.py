"""The checks' names, for a command line that has no torch."""

NAMES = (
    *("batches", "inputs", "labels", "loss", "gradients", "overfit", "learning_rate", "memory", "determinism"),
    *("speed", "compile", "environment"),
)
