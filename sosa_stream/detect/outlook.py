"""What would make an incident worse, and what ends it: for people, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping

from sosa_stream.detect.detectors import Detector
from sosa_stream.detect.incidents import Severity
from sosa_stream.detect.statistics import Level

WORSENS: Mapping[str, str] = {
    "nan_loss": "an update that is not skipped carries it into the weights; a third step in a row is critical",
    "nonfinite_gradient": "a third step in a row is critical: scale or weights do not recover by themselves",
    "lr_jump": "half of the progress undone, or a value that is not finite, makes it critical",
    "loss_spike": "twelve points without coming back make it a divergence",
    "loss_divergence": "half of the progress undone makes it critical; weights that far off seldom come back",
    "loss_oscillation": "swings that grow end in a divergence",
    "loss_plateau": "every further step is paid for and teaches nothing",
    "overfitting": "every further step takes the best checkpoint further away",
    "exploding_gradient": "a norm 100 times the usual while the loss suffers makes it critical",
    "vanishing_gradient": "the first layers stay as they were initialised however long it trains",
    "dead_units": "units without a gradient do not come back by themselves",
    "saturated_activations": "a saturated layer passes less gradient with every step that pushes it further",
    "loss_scale_collapse": "at its floor every step is skipped and nothing is learned",
    "weights_unchanged": "every further step is paid for and changes nothing",
    "missing_zero_grad": "every update repeats all earlier gradients: the norm grows, and the loss swings or diverges",
    "input_anomaly": "more such batches in a row, or one that drives the loss out of its band",
    "duplicate_data": "every further step costs all of these ranks and trains on the data of one",
    "posterior_collapse": "the decoder learns to do without the latent code, and does not unlearn it",
    "oom": "one sample that does not fit by itself, or memory that runs out in backward, ends the rank",
    "shape_mismatch": "the script has ended",
    "exception": "the rank has ended; its peers wait for it",
    "rank_desync": "every further step takes the replicas further apart",
    "data_stall": "every further step is paid for and in part spent waiting",
    "straggler": "every further step costs all ranks what this one takes longer",
    "silent_corruption": "what has changed is trained on with, and a host that does it once may do it again",
    "hang": "the collective's own timeout ends the ranks",
    "memory_leak": "memory that is used up: the allocator raises, or the kernel ends the process",
    "rank_lost": "the others wait for it, until their collective's timeout or torch elastic ends them",
}
WORST: Mapping[str, str] = {
    "nan_loss": "weights that are not finite stay so: every further step is lost",
    "nonfinite_gradient": "while it lasts no update is taken, or a bad one: every further step is lost",
    "lr_jump": "every further step at this rate takes the weights further from where a rollback finds them",
    "loss_divergence": "weights that far off seldom come back, and every further step takes them further",
    "exploding_gradient": "the next such step may end in a loss that is not finite",
    "oom": "the rank has ended, if its script does not catch the error; its peers wait for it",
}
"""Instead, where the incident is as severe as it can be: what comes next."""
CLEARS: Mapping[str, str] = {
    "loss_plateau": "the loss falls by 6% of where it stood",
    "overfitting": "the validation loss is back within 5% of its best",
    "oom": "the run goes on with whole batches, or begins again from its last good state with smaller ones (a fix sets "
    "them where the script has a knob named micro_batch_size)",
    "data_stall": "batches come in time in 6 of 8 windows",
    "straggler": "its own time is less than 1.18 times the others' in 6 of 8 windows",
    "hang": "ranks step again, or the run begins again",
    "memory_leak": "the memory of all ranks has stopped growing, or the run begins again",
    "rank_lost": "the run begins again with all its ranks (torch elastic's restart), or the rank is heard again",
    "shape_mismatch": "the run begins again",
    "exception": "the run begins again",
    "rank_desync": "the run begins again from a checkpoint, or the ranks are brought together (`sosa fix RUN resync "
    "source=0`)",
}
"""Where it is not a stretch of points without a finding."""


def worsens(kind: str, severity: Severity, cap: Severity = Severity.CRITICAL) -> str:
    """What would make it worse; a user's own rule says nothing of that."""
    text = WORSENS.get(kind, "it lasts")
    if severity < cap:
        return text
    return WORST.get(kind, text) if cap is Severity.CRITICAL else f"nothing: it is held at {cap}"


def clears(detector: Detector, level: Level | None) -> str:
    """What ends it, with the bound that is waited for."""
    text = CLEARS.get(detector.kind)
    if text is not None:
        return text
    points = f"{detector.quiet_points} points in a row"
    if detector.disturbs and level is not None:
        each = level.center + level.threshold * level.scale
        rate = ", and the learning rate has come back" if detector.kind == "lr_jump" else ""
        return (
            f"the loss stays below {each:.4g}, five's median below {level.top:.4g}, with no finding, for {points}{rate}"
        )
    if detector.well is not None:
        return f"the metric keeps the rule for {points}"
    return f"{points} do not show it"
