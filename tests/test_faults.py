"""Faults: their text, and that they strike at their step and on their rank only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.modules import module as torch_module  # noqa: E402
from torch.optim import SGD, Optimizer, lr_scheduler  # noqa: E402
from torch.optim import optimizer as torch_optimizer  # noqa: E402

from sosa_stream import faults  # noqa: E402
from sosa_stream.errors import UsageError  # noqa: E402
from sosa_stream.faults import Fault, parse_fault, parse_faults  # noqa: E402


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Takes away what a fault hooked and patched: in a real run that lasts as long as the process."""
    classes = [lr_scheduler.LRScheduler]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    steps = {cls: vars(cls)["step"] for cls in classes if "step" in vars(cls)}
    yield
    for cls, step in steps.items():
        cls.step = step
    torch_optimizer._global_optimizer_post_hooks.clear()
    torch_module._global_forward_pre_hooks.clear()
    torch_module._global_forward_hooks.clear()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 1)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        out = self.linear(self.embedding(tokens))
        return (out if weights is None else out * weights[:, None]).sum()


def test_a_fault_reads_back_as_written() -> None:
    assert parse_fault("nan_batch@600:rank=1") == Fault(kind="nan_batch", step=600, rank=1)
    assert parse_fault("lr_jump@350").values == {"factor": 1000.0}
    assert parse_fault("sleep@5:rank=0,seconds=0.5").values == {"seconds": 0.5, "steps": 1.0}
    for text in ("nan_batch@600:rank=1", "kill@3", "lr_jump@2:rank=0,factor=10", "oom@3:above=0,steps=1"):
        assert str(parse_fault(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr_jmp@3", "unknown kind 'lr_jmp'; known are lr_jump"),
        ("", "unknown kind ''"),
        ("nan_batch", "write the step as nan_batch@STEP"),
        ("nan_batch@", "write the step as nan_batch@STEP"),
        ("nan_batch@-1", "write the step as nan_batch@STEP"),
        ("nan_batch@1.5", "write the step as nan_batch@STEP"),
        ("lr_jump@0", "lr_jump needs a step from 1 on"),
        ("lr_jump@3:factr=2", "'factr=2' is no key=value of lr_jump; its keys are rank, factor"),
        ("kill@3:", "'' is no key=value of kill; its keys are rank"),
        ("kill@3:rank=x", "rank must be a whole number"),
        ("lr_jump@3:factor=0", "factor must be a number above 0"),
        ("lr_jump@3:factor=nan", "factor must be a number above 0"),
        ("sleep@3:seconds=soon", "seconds must be a number above 0"),
    ],
)
def test_what_is_no_fault_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_fault(text)
    assert says in str(caught.value)


def test_reading_faults_needs_no_torch() -> None:
    code = "import sys, sosa_stream.faults as f; f.parse_fault('kill@1'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_hooked_without_a_fault_for_this_rank() -> None:
    faults.install(parse_faults(["nan_batch@0:rank=1", "lr_jump@1:rank=2"]), rank=0)
    assert not torch_optimizer._global_optimizer_post_hooks
    assert not torch_module._global_forward_pre_hooks


SCHEDULERS: dict[str, Callable[[Optimizer], lr_scheduler.LRScheduler]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=30),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=30),
    "warm_restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[5],
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


def rates(make: Callable[[Optimizer], lr_scheduler.LRScheduler] | None, *, num_steps: int = 12) -> list[float]:
    """The learning rate that each optimizer step saw."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = SGD([parameter], lr=0.1)
    scheduler = None if make is None else make(optimizer)
    seen = []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return seen


# SequentialLR itself calls step(epoch) of the schedulers inside it.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", [*SCHEDULERS, None])
def test_a_jump_stays_and_does_not_compound(name: str | None) -> None:
    make = None if name is None else SCHEDULERS[name]
    healthy = rates(make)
    faults.install([parse_fault("lr_jump@4:factor=1000")], rank=0)
    faulty = rates(make)
    assert faulty[:4] == healthy[:4]
    assert faulty[4:] == pytest.approx([1000 * rate for rate in healthy[4:]])


def test_a_rate_set_by_hand_after_the_jump_is_scaled_from_the_new_value() -> None:
    faults.install([parse_fault("lr_jump@1:factor=10")], rank=0)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = SGD([parameter], lr=0.1)
    scheduler = lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.5)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.4
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 10)


def finite_steps(text: str, call: Callable[[nn.Module, int], Tensor], *, rank: int = 1) -> list[bool]:
    """For each of six steps of two accumulated parts with an evaluation before it: was every loss finite?"""
    faults.install([parse_fault(text)], rank=rank)
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.0)
    finite = []
    for step in range(6):
        model.eval()
        assert call(model, step).isfinite()
        model.train()
        parts = [call(model, step) for _ in range(2)]
        parts[1].backward()
        assert parts[1].isfinite(), "one batch, not one step of them"
        finite.append(bool(parts[0].isfinite()))
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad = None
    return finite


def positional(model: nn.Module, step: int) -> Tensor:
    out: Tensor = model(torch.tensor([1, 2]), torch.ones(2))
    return out


def keyword(model: nn.Module, step: int) -> Tensor:
    out: Tensor = model(torch.tensor([1, 2]), weights=torch.ones(2))
    return out


def tokens_only(model: nn.Module, step: int) -> Tensor:
    out: Tensor = model(torch.tensor([1, 2]))
    return out


@pytest.mark.parametrize("call", [positional, keyword, tokens_only])
@pytest.mark.parametrize("step", [0, 3])
def test_nan_strikes_one_batch_of_its_step(call: Callable[[nn.Module, int], Tensor], step: int) -> None:
    assert finite_steps(f"nan_batch@{step}:rank=1", call) == [index != step for index in range(6)]
    assert not torch_module._global_forward_pre_hooks, "a fault that is over costs nothing"
    assert not torch_module._global_forward_hooks


def test_nan_spares_the_other_ranks() -> None:
    assert all(finite_steps("nan_batch@3:rank=1", positional, rank=0))


def test_the_callers_own_batch_stays_whole() -> None:
    faults.install([parse_fault("nan_batch@0")], rank=0)
    weights = torch.ones(2)
    assert Model()(torch.tensor([1, 2]), weights).isnan()
    assert weights.isfinite().all()


@pytest.mark.parametrize(("kind", "error"), [("exception", RuntimeError), ("oom", torch.OutOfMemoryError)])
def test_an_error_is_raised_in_the_forward_pass_of_its_step(kind: str, error: type[Exception]) -> None:
    faults.install([parse_fault(f"{kind}@0:rank=0")], rank=0)
    model = Model()
    with pytest.raises(error, match=f"injected by {kind}@0:rank=0"):
        tokens_only(model, 0)


@pytest.mark.parametrize("call", [positional, keyword, lambda model, step: model(tokens=torch.tensor([1, 2]))])
def test_memory_that_holds_one_sample_fails_for_two_in_every_pass_of_its_steps(
    call: Callable[[nn.Module, int], Tensor],
) -> None:
    faults.install([parse_fault("oom@1:above=1,steps=2")], rank=0)
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.0)
    failed = []
    for step in range(4):
        for _ in range(2):
            try:
                call(model, step)
            except torch.OutOfMemoryError:
                failed.append(step)
        assert model(torch.tensor([1])).isfinite(), "one sample fits"
        optimizer.step()
    assert failed == [1, 1, 2, 2]
    assert not torch_module._global_forward_pre_hooks, "a fault that is over costs nothing"
    assert not torch_module._global_forward_hooks


def test_without_a_size_memory_fails_once_in_its_step_and_in_mid_pass() -> None:
    faults.install([parse_fault("oom@0")], rank=0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    begun, done = [], []
    model[0].register_forward_pre_hook(lambda *seen: begun.append(1))
    model[1].register_forward_pre_hook(lambda *seen: done.append(1))
    with pytest.raises(torch.OutOfMemoryError, match="with 3 samples"):
        model(torch.zeros(3, 2))
    assert (begun, done) == ([1], [])
    assert model(torch.zeros(3, 2)).shape == (3, 1)


def test_sleep_lasts_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert all(finite_steps("sleep@2:seconds=0.5,steps=3", positional))
    assert slept == [0.5] * 3


def test_kill_is_sigkill() -> None:
    code = (
        "import torch; from sosa_stream import faults; faults.install([faults.parse_fault('kill@0')], 0);"
        "torch.nn.Linear(1, 1)(torch.zeros(1)); print('alive')"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-9, "")
