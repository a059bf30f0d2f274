"""Does every parameter get a gradient, and does an optimizer step it?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, named, unknown

DEAD, MANY_DEAD = 0.5, 0.9
"""Share of a ReLU's units that never fire, over all samples seen."""
FEW_UNITS = 4
FEWEST_KEPT = 2


def check(context: Context) -> Finding:
    """After each backward pass: which gradients are there, which are all zero, which are not finite; dead units."""
    seen = context.seen
    if not seen.gradients:
        return unknown("no backward pass of a model with parameters has ended")
    owned = {id(p) for optimizer in seen.optimizers for group in optimizer.param_groups for p in group["params"]}
    reached = seen.gradients
    missing = _names(context, (key for key, its in reached.items() if not its.there))
    zero = _names(context, (key for key, its in reached.items() if its.there and not its.nonzero))
    nonfinite = _names(context, (key for key, its in reached.items() if its.nonfinite))
    frozen = [key for key, parameter in seen.parameters.items() if not parameter.requires_grad]
    forgotten = _names(context, (key for key in frozen if key in owned))
    orphans = _names(context, (key for key, its in reached.items() if its.there and key not in owned))
    strays = [
        f"{type(p).__name__} {list(p.shape)}"
        for optimizer in seen.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
        if id(p) not in seen.parameters and p.requires_grad and p.grad is None
    ]
    dead = {name: float((~alive).float().mean()) for name, alive in seen.units.alive.items() if len(alive) >= FEW_UNITS}
    dead = {name: share for name, share in dead.items() if share > DEAD}
    evidence: dict[str, Any] = {
        "num_parameters": len(seen.parameters),
        "num_passes": len(seen.passes),
        "no_gradient": missing,
        "of_no_model": strays,
        "zero_gradient": zero,
        "nonfinite_gradient": nonfinite,
        "frozen_in_optimizer": forgotten,
        "in_no_optimizer": orphans if seen.optimizers else [],
        "frozen": _names(context, (key for key in frozen if key not in owned)),
        "dead_units": dead,
        "kept_gradients": seen.num_kept,
    }
    problems, warnings, advice = [], [], []
    if missing:
        problems.append(f"{len(missing)} parameters get no gradient: {named(missing)}")
        advice.append("is the layer used in forward? does .detach(), .item() or no_grad() cut it off?")
    if strays:
        problems.append(
            f"{len(strays)} parameters of an optimizer get no gradient, of no model that ran: {named(strays)}"
        )
        advice.append("is the layer used? was the model made anew after the optimizer?")
    if nonfinite:
        problems.append(f"gradients are NaN or infinite: {named(nonfinite)}")
    if forgotten:
        problems.append(f"{len(forgotten)} parameters are frozen, yet an optimizer has them: {named(forgotten)}")
        advice.append("set requires_grad to True if they shall learn; else leave them out of the optimizer")
    if orphans and seen.optimizers:
        problems.append(f"{len(orphans)} parameters get a gradient but no optimizer steps them: {named(orphans)}")
        advice.append("was the optimizer made before the layer? give it all of model.parameters()")
    if seen.num_kept >= FEWEST_KEPT:
        problems.append(f"{seen.num_kept} updates left their gradients there, and the next backward added to them")
        advice.append("call optimizer.zero_grad() once for each optimizer.step()")
    killed = [name for name, share in dead.items() if share >= MANY_DEAD]
    told = [f"{name} ({share:.0%})" for name, share in dead.items()]
    if killed:
        problems.append(f"ReLU units that never fire: {named(told)}")
    elif dead:
        warnings.append(f"ReLU units that never fire: {named(told)}")
    if dead:
        advice.append("a bias far below zero, a rate that is too high or inputs that are not normalised kill units")
    if zero:
        (problems if killed else warnings).append(
            f"{len(zero)} parameters get a gradient of all zeros, each time: {named(zero)}"
        )
        if not dead:
            advice.append("is the layer multiplied by zero, or initialised so that it starts at zero on purpose?")
    told_frozen = f"; frozen and in no optimizer: {named(evidence['frozen'])}" if evidence["frozen"] else ""
    num_learn = len(reached) - len(missing) - len(zero) - len({*evidence["in_no_optimizer"], *nonfinite} - set(zero))
    says = f"{num_learn} of {len(seen.parameters)} parameters learn{told_frozen}"
    return Finding(
        status=Status.PROBLEM if problems else Status.WARNING if warnings else Status.OK,
        says=". ".join([*problems, *warnings, says]),
        evidence=evidence,
        advice=tuple(advice),
    )


def _names(context: Context, keys: Iterable[int]) -> list[str]:
    return [context.seen.names.get(key, "?") for key in keys]
