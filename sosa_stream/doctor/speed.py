"""How much of a step goes into loading, and what would make it faster: tried here, never claimed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.environment import num_cores
from sosa_stream.doctor.findings import Finding, Status, duration, unknown
from sosa_stream.doctor.replay import CannotReplayError, alone, first_pass
from sosa_stream.errors import describe

MUCH_LOADING, LITTLE_LOADING = 0.3, 0.05
"""Share of a step."""
ROUNDS, MOST_ROUNDS = 5, 15
NUM_BATCHES = 20
"""That a try of a DataLoader hands out, the first two not timed."""
WORTH_IT = 1.1
"""Times as fast: less lies within the noise of so few tries."""
SHARE = 0.3
"""Of the time that is left, for each comparison."""


def check(context: Context) -> Finding:
    """The share of loading in the steps seen; then loaders, AMP and a larger batch beside what there is, in turns."""
    seen = context.seen
    if not seen.step_seconds:
        return unknown("it takes two steps at least: --steps 5")
    step = statistics.median(seen.step_seconds)
    loads = [its["data_seconds"] for its in seen.parts if "data_seconds" in its]
    load = statistics.median(loads) if loads else None
    evidence: dict[str, Any] = {"step_seconds": step, "data_seconds": load, "num_steps": len(seen.step_seconds)}
    says = f"a step takes {duration(step)}"
    share = 0.0
    if load is None:
        says += "; how much of it is loading was not seen"
    else:
        share = min(1.0, load / step)
        evidence["loading_share"] = share
        says += f", {share:.0%} of it loading ({len(seen.step_seconds)} steps)"
    tried: dict[str, Any] = {}
    details: list[str] = []
    advice: list[str] = []
    details += _loaders(context, share, tried, advice)
    for trial in (_amp, _larger):
        try:
            details.append(trial(context, tried, advice))
        except Exception as error:  # the script's own code runs: one trial is not all
            details.append(f"{trial.__name__[1:]}: not measured: {describe(error)}")
    evidence["tried"] = tried
    if share >= MUCH_LOADING and not advice:
        advice.append("loading is the bottleneck: make the dataset's own code faster, or store what it computes")
    return Finding(
        status=Status.WARNING if share >= MUCH_LOADING else Status.OK,
        says=says,
        evidence=evidence,
        details=tuple(details),
        advice=tuple(advice),
    )


def check_compile(context: Context) -> Finding:
    """A pass with and without ``torch.compile``, in turns, after the first calls have compiled it."""
    copies = context.copies()
    recorded = first_pass(context.seen)
    torch._dynamo.config.disable = False

    def run() -> torch.Tensor:
        return copies.loss(recorded, reseed=False)

    began = time.perf_counter()
    with alone():
        compiled: Callable[[], torch.Tensor] = torch.compile(run)
        compiled().backward()  # type: ignore[no-untyped-call]
        compiled().backward()  # type: ignore[no-untyped-call]
        took = time.perf_counter() - began
        times = interleaved(context, [lambda: run().backward(), lambda: compiled().backward()])  # type: ignore[no-untyped-call]
    gain = times[0] / times[1]
    evidence = {"eager_seconds": times[0], "compiled_seconds": times[1], "compile_seconds": took, "gain": gain}
    says = f"forward and backward {_times(gain)}: {duration(times[0])} to {duration(times[1])}"
    says += f"; compiling took {duration(took)}"
    advice = ("torch.compile(model)",) if gain >= WORTH_IT else ()
    return Finding(status=Status.OK, says=says, evidence=evidence, advice=advice)


def interleaved(context: Context, runs: list[Callable[[], Any]]) -> list[float]:
    """The median seconds of each, called in turns so that what else the machine does hits them alike."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    until = context.time_left * (1.0 - SHARE)
    while len(times[0]) < ROUNDS or (len(times[0]) < MOST_ROUNDS and context.time_left > until):
        for run, its in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            if context.seen.device.type == "cuda":
                torch.cuda.synchronize()
            its.append(time.perf_counter() - began)
    return [statistics.median(its) for its in times]


def _times(gain: float) -> str:
    if 1 / WORTH_IT < gain < WORTH_IT:
        return "as fast, within the noise"
    return f"{gain:.2g} times as fast" if gain > 1 else f"{1 / gain:.2g} times slower"


def _amp(context: Context, tried: dict[str, Any], advice: list[str]) -> str:
    recorded = first_pass(context.seen)
    if any(node.autocast for node in recorded.nodes):
        return "AMP: is on already"
    copies = context.copies()
    device = context.seen.device.type

    def with_amp() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = copies.loss(recorded, reseed=False)
        loss.backward()  # type: ignore[no-untyped-call]

    with alone():
        plain, half = interleaved(context, [lambda: copies.step(recorded, reseed=False), with_amp])
    gain = plain / half
    tried["amp_bfloat16"] = {"seconds": plain, "with_seconds": half, "gain": gain}
    if gain >= WORTH_IT:
        advice.append(f'torch.autocast("{device}", dtype=torch.bfloat16) around forward and loss')
    return f"AMP in bfloat16: forward and backward {_times(gain)} ({duration(plain)} to {duration(half)})"


def _larger(context: Context, tried: dict[str, Any], advice: list[str]) -> str:
    recorded = first_pass(context.seen)
    if not recorded.batch_size:
        raise CannotReplayError("the batch's size cannot be told")
    copies = context.copies()
    with alone():
        once, twice = interleaved(
            context,
            [lambda: copies.step(recorded, reseed=False), lambda: copies.step(recorded, times=2, reseed=False)],
        )
    gain = 2.0 * once / twice
    tried["double_batch"] = {"seconds": once, "with_seconds": twice, "gain_in_samples_per_second": gain}
    if gain >= 1.3:
        advice.append("a larger batch (and a rate that fits it) uses this machine better")
    return f"a batch twice as large: {gain:.2g} times the samples a second ({duration(once)} to {duration(twice)})"


def _loaders(context: Context, share: float, tried: dict[str, Any], advice: list[str]) -> list[str]:
    """What other numbers of workers, and pinned memory, give."""
    if not context.seen.loaders:
        return ["workers, pinning: no DataLoader was used"]
    loader = context.seen.loaders[0]
    pin = "" if torch.cuda.is_available() else "pinning: not measured, it is for GPUs and there is none here"
    if share < LITTLE_LOADING:
        return [text for text in (f"workers: can gain no more than the {share:.0%} that loading takes", pin) if text]
    told = []
    cores = int(num_cores())
    numbers = sorted({loader.num_workers, 2, min(8, max(1, cores - 1))})
    variants = {f"{num} workers": {"num_workers": num} for num in numbers}
    if not pin and not loader.pin_memory:
        variants["pinned memory"] = {"num_workers": loader.num_workers, "pin_memory": True}
    now = f"{loader.num_workers} workers"
    rates: dict[str, float] = {}
    for name, changed in [*variants.items(), *variants.items()]:  # twice, the better one: starts are uneven
        if context.time_left < 1.5:
            break
        try:
            rates[name] = max(rates.get(name, 0.0), _throughput(context, loader, changed))
        except Exception as error:
            told.append(f"{name}: not measured: {describe(error)}")
    if now in rates and len(rates) > 1:
        tried["batches_per_second"] = rates
        told.append("batches a second: " + ", ".join(f"{rate:.3g} with {name}" for name, rate in rates.items()))
        best = max(rates, key=rates.__getitem__)
        if rates[best] >= WORTH_IT * rates[now]:
            advice.append(f"DataLoader with {best}: {rates[best] / rates[now]:.2g} times the batches a second")
    else:
        told.append("workers: not measured, no time was left")
    return [text for text in (*told, pin) if text]


def _throughput(context: Context, loader: DataLoader[Any], changed: dict[str, Any]) -> float:
    """Batches a second of a loader like this one."""
    settings: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
        "timeout": loader.timeout,
        "pin_memory": loader.pin_memory,
        **changed,
    }
    if isinstance(loader.dataset, IterableDataset):
        settings |= {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    elif loader.batch_sampler is not None:
        settings["batch_sampler"] = loader.batch_sampler
    else:
        settings |= {"batch_size": None, "sampler": loader.sampler}
    batches: Iterator[Any] = iter(DataLoader(loader.dataset, **settings))
    num = 0
    until = context.time_left * (1.0 - SHARE / 2)
    try:
        for _ in itertools.islice(batches, 2):
            pass
        began = time.perf_counter()
        for _ in itertools.islice(batches, NUM_BATCHES):
            num += 1
            if context.time_left < until:
                break
        took = time.perf_counter() - began
    finally:
        del batches
    if not num:
        raise CannotReplayError("an epoch has too few batches")
    return num / took
