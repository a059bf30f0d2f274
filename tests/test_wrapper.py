"""``wrap_training``, as somebody in a notebook uses it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import agent_parts  # noqa: F401  (one thread for torch)
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim import optimizer as torch_optimizer

from sosa_stream.agent import process
from sosa_stream.agent.repair.best import BestCheckpoint
from sosa_stream.agent.wrapper import SOSATrainingWrapper, wrap_training
from sosa_stream.errors import ConfigError, SosaError, UsageError
from sosa_stream.settings import Mode, Settings


class Net(nn.Module):
    """Takes inputs and targets, gives the loss in the shape asked for."""

    def __init__(self, shape: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.shape = shape

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        loss = nn.functional.mse_loss(self.layers(x), y)
        match self.shape:
            case "tuple":
                return loss, "more"
            case "dict":
                return {"loss": loss, "more": 1}
            case "attribute":
                return SimpleNamespace(loss=loss)
            case "none":
                return None
            case "float":
                return loss.item()
            case "unreduced":
                return (self.layers(x) - y) ** 2
            case "empty":
                return ()
        return loss


def batch_at(step: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, generator=generator)
    return x, x[:, :3].sum(1, keepdim=True).sin() + 0.1 * torch.randn(size, 1, generator=generator)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def wrap(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes wrappers that write below ``tmp_path``, and closes them."""
    monkeypatch.chdir(tmp_path)
    for name in ("SOSA_CONFIG", "SOSA_MODE", "SOSA_DISABLE", "SOSA_AUTO_ALLOW"):
        monkeypatch.delenv(name, raising=False)
    made: list[SOSATrainingWrapper] = []

    def make(model: Any = None, optimizer: Any = None, **options: Any) -> SOSATrainingWrapper:
        model = Net() if model is None else model
        optimizer = AdamW(model.parameters(), lr=3e-3) if optimizer is None else optimizer
        made.append(wrap_training(model, optimizer, **{"say": said.append, **options}))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()
    assert process.current() is None


def weights(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


# -- what goes in and what comes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tensor", "tuple", "dict", "attribute"])
@pytest.mark.parametrize("form", ["mapping", "tuple", "list"])
def test_batches_and_losses_of_every_promised_shape_are_taken(wrap: Any, shape: str, form: str) -> None:
    wrapper = wrap(Net(shape))
    x, y = batch_at(0)
    batch: Any = {"mapping": {"x": x, "y": y}, "tuple": (x, y), "list": [x, y]}[form]
    expected = nn.functional.mse_loss(wrapper.model.layers(x), y).item()
    before = weights(wrapper.model)
    loss = wrapper.training_step(batch)
    assert loss.item() == expected
    assert loss.shape == ()
    assert not loss.requires_grad
    assert weights(wrapper.model) != before


def test_a_tensor_batch_goes_in_as_the_one_argument(wrap: Any) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).square().mean()

    model = Energy()
    wrapper = wrap(model, SGD(model.parameters(), lr=0.01))
    assert wrapper.training_step(batch_at(0)[0]).item() > wrapper.training_step(batch_at(0)[0]).item()


def test_forward_fn_is_called_with_model_and_batch(wrap: Any) -> None:
    wrapper = wrap(Net())
    seen = []

    def forward(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((model, batch))
        return 2 * model(*batch_at(0))

    assert wrapper.training_step("anything", forward_fn=forward).item() > 0
    assert seen == [(wrapper.model, "anything")]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("none", "NoneType, in which there is no loss tensor"),
        ("float", "float, in which there is no loss tensor"),
        ("empty", "no loss tensor"),
        ("unreduced", r"not of shape \(32, 1\); reduce it"),
    ],
)
def test_a_forward_without_a_scalar_loss_is_told_what_to_return(wrap: Any, shape: str, words: str) -> None:
    wrapper = wrap(Net(shape))
    before = weights(wrapper.model)
    with pytest.raises(UsageError, match=words):
        wrapper.training_step(batch_at(0))
    assert weights(wrapper.model) == before
    assert wrapper.get_statistics()["steps"] == 0


def test_a_model_that_is_none_an_optimizer_that_is_none_and_a_meta_model_are_named() -> None:
    net = Net()
    with pytest.raises(UsageError, match=r"model must be a torch\.nn\.Module, not list"):
        wrap_training([], SGD(net.parameters(), lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"optimizer must be a torch\.optim\.Optimizer, not str"):
        wrap_training(net, "adam")  # type: ignore[arg-type]
    meta = nn.Linear(2, 2, device="meta")
    with pytest.raises(UsageError, match="meta device"):
        wrap_training(meta, SGD(meta.parameters(), lr=0.1))


@pytest.mark.parametrize("rate", [{}, {"lr": None}], ids=["missing", "none"])
def test_an_optimizer_without_a_learning_rate_is_refused(rate: dict[str, None]) -> None:
    class NoRate(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, rate)

    net = Net()
    with pytest.raises(UsageError, match="without 'lr'"):
        wrap_training(net, NoRate(net.parameters()))


def test_an_exception_of_the_models_own_reaches_the_script_unchanged_and_is_noted(wrap: Any, said: list[str]) -> None:
    wrapper = wrap()
    wrapper.training_step(batch_at(0))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        wrapper.training_step((torch.zeros(4, 5), torch.zeros(4, 1)))
    assert wrapper.training_step(batch_at(1)).isfinite()
    assert any("mat1 and mat2" in incident["message"] for incident in wrapper.get_statistics()["incidents"])
    assert any("mat1 and mat2" in text for text in said)


def test_out_of_memory_is_diagnosed_and_its_loss_is_not_counted_twice(wrap: Any, said: list[str]) -> None:
    wrapper = wrap()
    for step in range(3):
        wrapper.training_step(batch_at(step))

    def too_large(model: nn.Module, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        wrapper.training_step(batch_at(3), forward_fn=too_large)
    error = wrapper.monitor.detect_error()
    assert error is not None
    assert error.kind == "oom"
    assert any("oom" in text for text in said)


# -- only watching -----------------------------------------------------------------------------------------------------


def test_without_auto_fix_training_is_bit_identical_to_the_bare_loop(wrap: Any, said: list[str]) -> None:
    def damaged(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch_at(step)
        return (x, y * 1e4) if step == 45 else (x, y)

    bare = Net()
    optimizer = AdamW(bare.parameters(), lr=3e-3)
    for step in range(70):
        loss = bare(*damaged(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrapper = wrap(auto_fix=False)
    for step in range(70):
        wrapper.training_step(damaged(step))
    assert weights(wrapper.model) == weights(bare)
    assert wrapper.settings.mode is Mode.SUGGEST
    assert any("applies nothing, suggests only" in text for text in said)


def test_auto_fix_too_leaves_a_healthy_run_bit_identical(wrap: Any) -> None:
    bare = Net()
    optimizer = AdamW(bare.parameters(), lr=3e-3)
    for step in range(60):
        loss = bare(*batch_at(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wrapper = wrap()
    for step in range(60):
        wrapper.training_step(batch_at(step))
    assert weights(wrapper.model) == weights(bare)
    assert wrapper.get_statistics()["last_fixes"] == []


def test_it_says_once_which_actions_it_may_take(wrap: Any, said: list[str]) -> None:
    wrapper = wrap()
    for step in range(5):
        wrapper.training_step(batch_at(step))
    promise = "may apply by itself: skip_step, split_batch, clip_grad, scale_lr, rollback"
    assert [text for text in said if promise in text] == said[:1]


def test_an_allow_list_of_the_users_own_is_kept(wrap: Any, said: list[str]) -> None:
    wrapper = wrap(config={"auto.allow": ["skip_step"]})
    assert wrapper.settings.auto.allow == ("skip_step",)
    assert any("may apply by itself: skip_step" in text for text in said)


# -- faults ------------------------------------------------------------------------------------------------------------


def test_a_nan_batch_is_skipped_diagnosed_and_training_goes_on(wrap: Any, said: list[str]) -> None:
    wrapper = wrap()
    for step in range(40):
        wrapper.training_step(batch_at(step))
    before = weights(wrapper.model)
    x, y = batch_at(40)
    loss = wrapper.training_step((x * math.nan, y))
    assert loss.isnan()
    assert weights(wrapper.model) == before
    error = wrapper.monitor.detect_error()
    assert error is not None
    assert error.step == 40
    assert error.severity in ("warning", "critical")
    assert error.causes
    fix = wrapper.monitor.suggest_fix(error)
    assert fix is not None
    assert fix.action_type == "skip_step"
    assert 0.0 <= fix.confidence <= 1.0
    diagnosis = "\n".join(said)
    assert "step 40: detected" in diagnosis
    assert "likely cause" in diagnosis
    assert "skip_step" in diagnosis
    for step in range(41, 70):
        assert wrapper.training_step(batch_at(step)).isfinite()
    assert wrapper.monitor.detect_error() is None
    assert wrapper.get_statistics()["anomaly_steps"] >= 1


def test_without_auto_fix_a_nan_batch_is_diagnosed_with_a_suggestion(wrap: Any, said: list[str]) -> None:
    wrapper = wrap(auto_fix=False)
    for step in range(40):
        wrapper.training_step(batch_at(step))
    wrapper.training_step((batch_at(40)[0] * math.nan, batch_at(40)[1]))
    error = wrapper.monitor.detect_error()
    assert error is not None
    assert any("step 40: detected" in text for text in said)
    assert not wrapper.get_statistics()["last_fixes"]


def _validation(model: nn.Module) -> float:
    with torch.no_grad():
        return float(torch.stack([model(*batch_at(1_000_000 + i, 256)) for i in range(4)]).mean())


def _train_with_jump(wrapper: Any, num_steps: int, jump_at: int | None) -> None:
    """A cosine schedule; from ``jump_at`` on the rate is a thousand times what it should be."""
    peak = 3e-3
    for step in range(num_steps):
        rate = peak * 0.5 * (1 + math.cos(math.pi * step / num_steps)) + 3e-4
        if jump_at is not None and step >= jump_at:
            rate *= 1000
        for group in wrapper.optimizer.param_groups:
            group["lr"] = rate
        wrapper.training_step(batch_at(step))


def test_a_learning_rate_a_thousand_times_too_large_is_repaired_to_near_the_clean_run(
    wrap: Any, said: list[str]
) -> None:
    clean = wrap(auto_fix=False)
    _train_with_jump(clean, 500, None)
    untreated = wrap(auto_fix=False)
    _train_with_jump(untreated, 500, 250)
    wrapper = wrap()
    _train_with_jump(wrapper, 500, 250)
    best, worst, repaired = _validation(clean.model), _validation(untreated.model), _validation(wrapper.model)
    assert worst > 1.8 * best
    assert repaired < 1.2 * best
    seen = wrapper.get_statistics()
    assert {"scale_lr", "rollback"} <= {a["action"] for fix in seen["last_fixes"] for a in fix["actions"]}
    assert seen["learning_rate"] < seen["learning_rate_of_the_script"] / 100
    assert sum(seen["fixes_per_kind"].values()) >= 1


# -- what is told ------------------------------------------------------------------------------------------------------

PROMISED = {
    "steps",
    "best_loss",
    "best_checkpoint",
    "fixes_per_kind",
    "learning_rate",
    "clip_bound",
    "anomaly_steps",
    "anomaly_rate",
    "last_fixes",
    "recent_loss",
}


@pytest.mark.parametrize("steps", [0, 3])
def test_statistics_are_json_with_the_promised_keys(wrap: Any, steps: int) -> None:
    wrapper = wrap()
    for step in range(steps):
        wrapper.training_step(batch_at(step))
    if steps:
        wrapper.training_step((batch_at(0)[0] * math.nan, batch_at(0)[1]))
    seen = json.loads(json.dumps(wrapper.get_statistics(), allow_nan=False))
    assert set(seen) >= PROMISED
    assert seen["steps"] == steps + bool(steps)
    assert seen["learning_rate"] == pytest.approx(3e-3)
    assert set(seen["recent_loss"]) == {"mean", "std", "min"}


def test_the_report_shows_where_training_stands(wrap: Any, said: list[str]) -> None:
    wrapper = wrap()
    wrapper.print_report()
    assert "none yet" in said[-1]
    for step in range(10):
        wrapper.training_step(batch_at(step))
    wrapper.print_report()
    report = said[-1]
    for word in (
        "steps",
        "best loss",
        "best checkpoint",
        "learning rate",
        "clip bound",
        "anomaly steps",
        "recent loss",
    ):
        assert word in report
    assert "10" in report


def test_print_report_prints_when_nobody_else_is_named(wrap: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrapper = wrap(say=None)
    wrapper.print_report()
    assert "learning rate" in capsys.readouterr().out


# -- the best checkpoint -----------------------------------------------------------------------------------------------


def test_the_best_state_is_kept_and_can_be_loaded(wrap: Any, tmp_path: Path) -> None:
    wrapper = wrap(checkpoint_dir=tmp_path / "kept", checkpoint_every=5)
    for step in range(20):
        wrapper.training_step(batch_at(step))
    saved = weights(wrapper.model)
    assert wrapper.get_statistics()["best_checkpoint_step"] == 19
    for step in range(20, 23):
        wrapper.training_step(batch_at(step))
    assert weights(wrapper.model) != saved
    assert wrapper.load_best() == 19
    assert weights(wrapper.model) == saved
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["best.pt"]


def test_loading_without_a_checkpoint_says_so(wrap: Any) -> None:
    with pytest.raises(SosaError, match="no best checkpoint has been saved yet"):
        wrap().load_best()


def test_a_checkpoint_cut_short_leaves_the_last_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    best = BestCheckpoint(tmp_path, model, SGD(model.parameters(), lr=0.1), every_steps=1)
    best.observe(0, 5.0, trusted=True)
    whole = best.path.read_bytes()

    def killed(state: Mapping[str, Any], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(OSError, match="disk full"):
        best.observe(1, 1.0, trusted=True)
    assert best.path.read_bytes() == whole


def test_a_full_disk_does_not_end_the_training(wrap: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, path: Any) -> None:
        raise OSError("disk full")

    wrapper = wrap(checkpoint_every=1)
    monkeypatch.setattr(torch, "save", full)
    for step in range(5):
        wrapper.training_step(batch_at(step))
    assert len([text for text in said if "disk full" in text]) == 1


def test_neither_non_finite_weights_nor_an_incidents_state_become_the_best(tmp_path: Path) -> None:
    model = Net()
    best = BestCheckpoint(tmp_path, model, SGD(model.parameters(), lr=0.1), every_steps=1)
    best.observe(0, math.nan, trusted=True)
    best.observe(1, 1.0, trusted=False)
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    best.observe(2, 0.5, trusted=True)
    assert not best.path.exists()


# -- configuration -----------------------------------------------------------------------------------------------------


def test_a_configs_sosa_section_switches_it_off_or_to_watching(wrap: Any) -> None:
    off = wrap(config=SimpleNamespace(sosa=SimpleNamespace(enabled=False)))
    before = dict(torch_optimizer._global_optimizer_pre_hooks)
    assert off.training_step(batch_at(0)).isfinite()
    assert not off.optimizer._optimizer_step_pre_hooks
    assert dict(torch_optimizer._global_optimizer_pre_hooks) == before
    assert off.get_statistics()["steps"] == 1
    off.print_report()
    watching = wrap(config=SimpleNamespace(sosa=SimpleNamespace(enabled=True, auto_fix=False)))
    assert watching.settings.mode is Mode.SUGGEST


def test_the_environment_switches_it_off(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOSA_DISABLE", "1")
    wrapper = wrap()
    assert wrapper.training_step(batch_at(0)).isfinite()
    assert not wrapper.optimizer._optimizer_step_pre_hooks


def test_settings_come_as_they_are_and_mistakes_are_named(wrap: Any) -> None:
    assert wrap(config=Settings(mode=Mode.OBSERVE)).settings.mode is Mode.OBSERVE
    assert wrap(max_fixes_per_error=7).settings.auto.max_fixes_per_error == 7
    with pytest.raises(ConfigError, match=r"unknown setting 'no\.such'"):
        wrap(config={"no.such": 1})
    with pytest.raises(ConfigError, match=r"detect\.loss_spikes: there is no such kind"):
        wrap(config={"detect.overrides": {"loss_spikes": {"enabled": False}}})
    with pytest.raises(UsageError, match="`sosa` section"):
        wrap(config=3)
    with pytest.raises(UsageError, match="checkpoint_every"):
        wrap(checkpoint_every=0)


def test_a_mistake_in_the_environment_is_told_and_training_goes_on_unwatched(
    wrap: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOSA_CONFIG", "absent.toml")
    wrapper = wrap()
    assert said == ["sosa: cannot read absent.toml: No such file or directory; training goes on unwatched"]
    assert wrapper.training_step(batch_at(0)).isfinite()
    assert not wrapper.optimizer._optimizer_step_pre_hooks


# -- being alone in one process ----------------------------------------------------------------------------------------


def test_one_process_alone_opens_no_socket_and_starts_no_thread(wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a socket")

    monkeypatch.setattr(zmq, "Context", never)
    monkeypatch.setattr("socket.socket.connect", never)
    threads = set(threading.enumerate())
    wrapper = wrap()
    for step in range(3):
        wrapper.training_step(batch_at(step))
    assert set(threading.enumerate()) == threads
    wrapper.close()
    assert set(threading.enumerate()) == threads


def test_close_restores_everything_and_may_be_called_twice(wrap: Any) -> None:
    wrapper = wrap()
    before = torch.autograd.backward
    wrapper.training_step(batch_at(0))
    wrapper.close()
    wrapper.close()
    assert not wrapper.optimizer._optimizer_step_pre_hooks
    assert not wrapper.optimizer._optimizer_step_post_hooks
    assert torch.autograd.backward is before
    assert process.current() is None
    assert wrapper.get_statistics()["steps"] == 1


def test_a_with_block_closes(wrap: Any) -> None:
    with wrap() as wrapper:
        wrapper.training_step(batch_at(0))
    assert process.current() is None


def test_two_wrappers_in_one_process_each_watch_their_own(wrap: Any) -> None:
    first, second = wrap(), wrap()
    for step in range(40):
        first.training_step(batch_at(step))
        second.training_step(batch_at(step))
    before = weights(second.model)
    second.training_step((batch_at(0)[0] * math.nan, batch_at(0)[1]))
    first.training_step(batch_at(40))
    assert weights(second.model) == before
    assert second.monitor.detect_error() is not None
    assert first.monitor.detect_error() is None
    first.close()
    assert second.training_step(batch_at(41)).isfinite()
    assert second.get_statistics()["steps"] == 42
