"""`split_batch` in one process: the same gradient in parts, remembered and relaxed; and each reason to refuse."""

from __future__ import annotations

import collections
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, carry_out, command
from split_parts import NUM_SAMPLES, Net, batch_at, flat, mse, too_large_for_backward, too_large_for_the_loss
from torch import nn
from torch.optim import SGD, AdamW

from sosa_stream.agent.splitting.batches import count_samples, cut, split
from sosa_stream.agent.splitting.memory import breakdown, is_out_of_memory
from sosa_stream.agent.splitting.micro_batches import RELAX_STEPS, Need
from sosa_stream.agent.wrapper import SOSATrainingWrapper, wrap_training
from sosa_stream.errors import RefusedError, UsageError
from sosa_stream.settings import Mode

Wrap = Callable[..., SOSATrainingWrapper]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def wrap(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Wrap]:
    monkeypatch.chdir(tmp_path)
    made: list[SOSATrainingWrapper] = []

    def make(model: nn.Module, **options: Any) -> SOSATrainingWrapper:
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        made.append(wrap_training(model, optimizer, **{"say": said.append, **options}))
        return made[-1]

    yield make
    for wrapper in made:
        wrapper.close()


def train(wrapper: SOSATrainingWrapper, num_steps: int, forward: Any = mse, first: int = 0) -> list[float]:
    return [wrapper.training_step(batch_at(step), forward).item() for step in range(first, first + num_steps)]


# -- the same gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "parts"), [(4, 2), (3, 4), (1, 8)])
def test_a_batch_that_does_not_fit_runs_in_parts_with_the_gradient_and_the_loss_of_the_whole(
    wrap: Wrap, said: list[str], capacity: int, parts: int
) -> None:
    whole, small = wrap(Net()), wrap(Net(capacity=capacity))
    assert train(small, 6) == pytest.approx(train(whole, 6), rel=1e-5)
    torch.testing.assert_close(flat(small.model), flat(whole.model))
    assert small.model.sizes[-parts:] == [NUM_SAMPLES // parts] * parts
    assert any(f"run in {parts} parts from here on, with the same gradient" in text for text in said)
    assert small.get_statistics()["steps"] == 6


def test_a_batch_that_does_not_divide_is_weighted_by_its_samples(wrap: Wrap) -> None:
    whole, small = wrap(Net()), wrap(Net(capacity=2))
    for step in range(3):
        expected = whole.training_step(batch_at(step, 7), mse)
        torch.testing.assert_close(small.training_step(batch_at(step, 7), mse), expected)
    torch.testing.assert_close(flat(small.model), flat(whole.model))
    assert small.model.sizes[-4:] == [1, 2, 2, 2]


def test_what_was_needed_is_remembered_so_that_memory_runs_out_once(wrap: Wrap) -> None:
    wrapper = wrap(Net(capacity=4))
    train(wrapper, 5)
    assert wrapper.model.sizes == [8] + [4, 4] * 5


def test_out_of_memory_after_the_pass_in_the_loss_is_split_too(wrap: Wrap) -> None:
    whole, small = wrap(Net()), wrap(Net())
    train(whole, 4)
    train(small, 4, too_large_for_the_loss(4))
    torch.testing.assert_close(flat(small.model), flat(whole.model))


def test_out_of_memory_in_backward_is_split_too_where_no_gradient_is_under_way_to_peers(wrap: Wrap) -> None:
    whole, small = wrap(Net()), wrap(Net(capacity=4))
    train(whole, 4)
    train(small, 4, too_large_for_backward(2))
    torch.testing.assert_close(flat(small.model), flat(whole.model))
    assert small.model.sizes == [8, 4, *[2, 2, 2, 2] * 4]


def test_the_allocator_of_the_cpu_counts_as_out_of_memory(wrap: Wrap) -> None:
    def greedy(model: nn.Module, batch: Any) -> torch.Tensor:
        if len(batch[0]) == NUM_SAMPLES:
            torch.empty(1 << 60, dtype=torch.uint8)
        return mse(model, batch)

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    wrapper = wrap(Net())
    assert train(wrapper, 1, greedy)[0] == pytest.approx(mse(Net(), batch_at(0)).item(), rel=1e-5)


def test_the_failed_pass_holds_nothing_while_the_parts_run(wrap: Wrap) -> None:
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def keeps_much(model: nn.Module, batch: Any) -> torch.Tensor:
        activations = model(batch[0]) * 2
        if len(batch[0]) == NUM_SAMPLES:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("out of memory (test)")
        assert [ref() for ref in held] == [None] * len(held), "the failed pass's activations are still there"
        return nn.functional.mse_loss(activations, batch[1])

    train(wrap(Net()), 1, keeps_much)
    assert len(held) == 1


def test_dropout_is_no_reason_to_refuse_and_the_look_at_the_loss_draws_no_random_number(wrap: Wrap) -> None:
    wrapper = wrap(Net(nn.Dropout(0.5), capacity=4))
    wrapper.training_step(batch_at(0), mse)
    states: list[torch.Tensor] = []

    def watched(model: nn.Module, batch: Any) -> torch.Tensor:
        states.append(torch.get_rng_state())
        return mse(model, batch)

    wrapper.training_step(batch_at(1), watched)
    looks, training = states[:-2], states[-2:]
    assert len(looks) == 9, "three times a few samples and their halves"
    assert torch.equal(training[0], looks[0])
    assert wrapper.model.training


def test_batches_of_any_form_are_cut(wrap: Wrap) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float, extra: Any = None) -> dict[str, Any]:
            if len(x) > 4:
                raise torch.OutOfMemoryError("out of memory (test)")
            return {"loss": scale * nn.functional.mse_loss(self.linear(x), y)}

    x, y = batch_at(0)
    wrapper = wrap(Keywords())
    assert wrapper.training_step({"x": x, "y": y, "scale": 2.0, "extra": [x, None]}).isfinite()
    pair = collections.namedtuple("pair", "x y")
    first = cut(pair(x, y), 0, 3)
    assert type(first) is pair
    assert (len(first.x), len(first.y)) == (3, 3)
    assert [round(share, 3) for _, share in split((x[:7], y[:7]), 2)] == [0.429, 0.571]


# -- remembered, relaxed -----------------------------------------------------------------------------------------------


def test_after_a_while_half_as_many_parts_are_tried_and_the_wait_doubles_when_that_was_too_early() -> None:
    need = Need()
    need.ran_out(8)
    waits = []
    for _ in range(3):
        num_steps = 0
        while need.num_parts == 8:
            need.went_well()
            num_steps += 1
        assert need.num_parts == 4
        need.ran_out(8)
        waits.append(num_steps)
    assert waits == [RELAX_STEPS, 2 * RELAX_STEPS, 4 * RELAX_STEPS]


def test_a_shortage_that_has_passed_leaves_whole_batches_again(wrap: Wrap) -> None:
    wrapper = wrap(Net(capacity=4))
    train(wrapper, 1)
    wrapper.model.capacity = None
    train(wrapper, RELAX_STEPS + 1, first=1)
    assert wrapper.model.sizes == [8, *[4, 4] * (RELAX_STEPS + 1), 8]


# -- by command --------------------------------------------------------------------------------------------------------


def test_a_command_sets_the_parts_and_its_revert_those_of_before(wrap: Wrap) -> None:
    wrapper = wrap(Net())
    assert wrapper._agent is not None
    actuators = wrapper._agent.actuators
    four, two = command(act("split_batch", num_parts=4)), command(act("split_batch", num_parts=2))
    assert actuators.refusal(four, 0) == ""
    for fix, sizes in ((four, [2] * 4), (two, [4] * 2)):
        carry_out(actuators, fix, 0, 0)
        wrapper.training_step(batch_at(0), mse)
        assert wrapper.model.sizes[-len(sizes) :] == sizes
    carry_out(actuators, command(act("revert", command=two.id)), 0, 0)
    wrapper.training_step(batch_at(0), mse)
    assert wrapper.model.sizes[-4:] == [2] * 4
    carry_out(actuators, command(act("revert", command=four.id)), 0, 0)
    wrapper.training_step(batch_at(0), mse)
    assert wrapper.model.sizes[-1] == NUM_SAMPLES


def test_a_command_to_split_what_cannot_be_split_leaves_batches_whole_and_says_why(wrap: Wrap, said: list[str]) -> None:
    wrapper = wrap(Net(nn.BatchNorm1d(16)))
    assert wrapper._agent is not None
    carry_out(wrapper._agent.actuators, command(act("split_batch", num_parts=2)), 0, 0)
    train(wrapper, 2)
    assert wrapper.model.sizes == [8, 8]
    assert len([text for text in said if "run whole, not in 2 parts" in text and "BatchNorm1d" in text]) == 1


def test_without_a_training_step_the_command_is_refused() -> None:
    with Watch().installed() as watch:
        assert "only the batches of training_step" in watch.actuators.refusal(
            command(act("split_batch", num_parts=2)), 0
        )


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(wrapper: SOSATrainingWrapper, forward: Any = mse, batch: Any = None) -> str:
    """The note on the script's own error, which must be all that reaches it."""
    before = flat(wrapper.model)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        wrapper.training_step(batch_at(0) if batch is None else batch, forward)
    assert torch.equal(flat(wrapper.model), before), "nothing half done"
    (note,) = getattr(caught.value, "__notes__", [""])
    incident = wrapper.get_statistics()["incidents"][-1]
    assert (incident["kind"], incident["severity"]) == ("oom", "critical")
    assert note in incident["message"]
    return str(note)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.BatchNorm1d(16), "extra.0 is a BatchNorm1d: its statistics are those of the whole batch"),
        (nn.SyncBatchNorm(16), "extra.0 is a SyncBatchNorm"),
        (
            nn.Sequential(nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()),
            "extra.0.1 is a InstanceNorm1d with running statistics",
        ),
    ],
)
def test_layers_that_see_the_whole_batch_are_a_reason_to_refuse(wrap: Wrap, layer: nn.Module, why: str) -> None:
    assert why in refused(wrap(Net(layer, capacity=4)))


def test_a_batch_norm_that_is_frozen_is_none(wrap: Wrap) -> None:
    wrapper = wrap(Net(nn.BatchNorm1d(16), capacity=4))
    wrapper.model.extra.eval()
    train(wrapper, 2)
    assert wrapper.model.sizes == [8, 4, 4, 4, 4]
    assert not wrapper.model.extra[0].training
    assert wrapper.model.last.training


class Ema(nn.Module):
    """A codebook or a statistic that a training pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return x


def test_a_pass_that_moves_buffers_is_a_reason_to_refuse(wrap: Wrap) -> None:
    assert "a pass changes buffers of the model" in refused(wrap(Net(Ema(), capacity=4)))


def summed(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum")


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    embedded = nn.functional.normalize(model.first(batch[0]), dim=1)
    model(batch[0])
    return nn.functional.cross_entropy(embedded @ embedded.T / 0.1, torch.arange(len(embedded)))


def weighted_by_class(model: nn.Module, batch: Any) -> torch.Tensor:
    kinds = (batch[1][:, 0] > 0.3).long()
    logits = torch.cat([model(batch[0]), -batch[0][:, :1]], dim=1)
    return nn.functional.cross_entropy(logits, kinds, weight=torch.tensor([1.0, 9.0]))


def divided_by_a_count(model: nn.Module, batch: Any) -> torch.Tensor:
    return summed(model, batch) / NUM_SAMPLES


def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0] + torch.randn_like(batch[0])), batch[1])


def of_nothing(model: nn.Module, batch: Any) -> torch.Tensor:
    return 0.0 * mse(model, batch)


def not_finite(model: nn.Module, batch: Any) -> torch.Tensor:
    return mse(model, batch) * math.nan


def by_name(model: Any, batch: Any) -> torch.Tensor:
    if not model.training:
        raise AttributeError("no such thing in eval mode")
    return mse(model, batch)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (summed, "the loss is a sum over samples"),
        (contrastive, "the loss is not a mean over samples"),
        (weighted_by_class, "the loss is not a mean over samples"),
        (divided_by_a_count, "the loss is a sum over samples"),
        (noisy, "the loss is random even in eval mode"),
        (of_nothing, "the loss of a few samples is 0"),
        (not_finite, "not a mean over samples|random"),
        (by_name, "cannot be looked at: AttributeError: no such thing in eval mode"),
    ],
)
def test_a_loss_that_is_not_a_mean_over_samples_is_a_reason_to_refuse(
    wrap: Wrap, forward: Callable[..., torch.Tensor], why: str
) -> None:
    import re

    assert re.search(why, refused(wrap(Net(capacity=4)), forward))


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ((torch.randn(8, 6), torch.randn(4, 1)), "first dimensions differ: 4, 8"),
        ((torch.randn(8, 6), torch.tensor(1.0)), "a tensor in it has no samples in its first dimension"),
        ((torch.randn(8, 6), torch.randn(8, 1), object()), "there is a object in it"),
        ((torch.randn(8, 6), torch.randn(8, 1), {1, 2}), "there is a set in it"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_a_reason_to_refuse(wrap: Wrap, batch: Any, why: str) -> None:
    assert why in refused(wrap(Net(capacity=4)), mse, batch)


def test_one_sample_cannot_be_split(wrap: Wrap) -> None:
    assert "the batch is one sample" in refused(wrap(Net(capacity=0)), mse, batch_at(0, 1))
    assert "one sample at a time is too much" in refused(wrap(Net(capacity=0)))


def test_sequences_with_unequal_numbers_of_labels_are_a_reason_to_refuse() -> None:
    labels = torch.arange(32).reshape(8, 4)
    labels[:, 0] = -100
    assert len(split((labels,), 4)) == 4, "as many in each sample"
    labels[7, 1] = -100
    with pytest.raises(RefusedError, match="unequal numbers of labels"):
        split((labels,), 4)
    assert count_samples({"labels": labels, "use_cache": False}) == 8


def test_a_forward_that_returns_none_is_told_what_to_return_and_nothing_is_tried_again(wrap: Wrap) -> None:
    calls: list[int] = []

    def nothing(model: nn.Module, batch: Any) -> None:
        calls.append(1)

    with pytest.raises(UsageError, match="no loss tensor"):
        wrap(Net(capacity=4)).training_step(batch_at(0), nothing)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_parts_that_raise_something_else_leave_the_script_its_own_error(wrap: Wrap) -> None:
    def fragile(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = mse(model, batch)
        if model.training and len(batch[0]) == 4:
            raise ValueError("four are not liked")
        return loss

    assert "in 2 parts it went on, then: ValueError: four are not liked" in refused(wrap(Net(capacity=4)), fragile)


@pytest.mark.parametrize("options", [{"auto_fix": False}, {"config": {"auto.allow": ["skip_step"]}}])
def test_where_it_is_not_allowed_the_error_is_the_scripts_and_nothing_is_tried(
    wrap: Wrap, options: dict[str, Any]
) -> None:
    wrapper = wrap(Net(capacity=4), **options)
    assert refused(wrapper) == ""
    assert wrapper.model.sizes == [8]
    assert wrapper.settings.mode is Mode.SUGGEST or wrapper.settings.auto.allow == ("skip_step",)


def test_a_kill_file_keeps_a_rank_from_splitting(wrap: Wrap, tmp_path: Path) -> None:
    wrapper = wrap(Net(capacity=4), config={"auto.kill_file": str(tmp_path / "stop")})
    (tmp_path / "stop").touch()
    assert refused(wrapper) == ""
    (tmp_path / "stop").unlink()
    train(wrapper, 1)
    assert wrapper.model.sizes == [8, 8, 4, 4]


def test_a_script_that_catches_the_error_goes_on(wrap: Wrap) -> None:
    wrapper = wrap(Net(nn.BatchNorm1d(16), capacity=4))
    for step in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            wrapper.training_step(batch_at(step), mse)
        assert wrapper.training_step(batch_at(step, 4), mse).isfinite()
    assert wrapper.get_statistics()["steps"] == 3


REAL = """
import resource, torch
from pathlib import Path
from torch import nn
from sosa_stream import wrap_training

torch.set_num_threads(1)
torch.manual_seed(0)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x, y):
        hidden = x[:, :1].expand(-1, 1 << 22) * self.scale  # 16 MB a sample, for each of three that are kept
        for _ in range(3):
            hidden = torch.tanh(hidden)
        return nn.functional.mse_loss(hidden[:, :1], y)

def train(limit):
    model = Wide()
    if limit:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + limit, resource.RLIM_INFINITY))
    with wrap_training(model, torch.optim.SGD(model.parameters(), lr=0.1)) as wrapper:
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 4, generator=generator)
            wrapper.training_step((x, x[:, :1].sin()))
        return model.scale.item(), [c.actions[0].params["num_parts"] for c in wrapper.monitor.commands.values()]

free, none = train(0)
short, parts = train(450 * 10**6)
assert not none and parts and parts[0] in (2, 4, 8), (none, parts)
assert abs(free - short) < 1e-5 and free != 1.0, (free, short)
print("parts", parts)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits the address space as Linux does")
def test_a_real_allocator_that_fails_in_mid_pass_finds_room_for_the_parts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", REAL],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "DefaultCPUAllocator: can't allocate memory" in done.stdout, "not a fault on purpose"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_too_small_finds_room_for_the_parts_and_says_what_held_it(wrap: Wrap) -> None:
    model = nn.Sequential(nn.Linear(6, 1 << 20), nn.Tanh(), nn.Linear(1 << 20, 1)).cuda()
    whole_batch = [tensor.cuda() for tensor in batch_at(0, 512)]
    wrapper = wrap(model)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 3 * 2**30) / total)
    try:
        for _ in range(3):
            assert wrapper.training_step(whole_batch, mse).isfinite()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (incident,) = wrapper.get_statistics()["incidents"]
    assert incident["severity"] == "warning"
    assert incident["evidence"]["memory"]["other"] > incident["evidence"]["memory"]["parameters"]


# -- explained ---------------------------------------------------------------------------------------------------------


def test_the_breakdown_counts_every_byte_of_what_training_keeps() -> None:
    model = Net(nn.BatchNorm1d(16))
    optimizer = AdamW(model.parameters(), lr=0.1)
    mse(model, batch_at(0)).backward()
    optimizer.step()
    found = breakdown([optimizer])
    size = 4 * sum(p.numel() for p in model.parameters())
    assert found["parameters"] == found["gradients"] == size
    assert found["optimizer_state"] == 2 * size + 4 * len(list(model.parameters())), "two moments, and a step each"
    assert found["buffers"] == 2 * 16 * 4 + 8
    assert found["resident"] > size


def test_each_change_is_an_incident_with_the_memory_and_a_record_of_the_guard(wrap: Wrap) -> None:
    wrapper = wrap(Net(capacity=4))
    train(wrapper, 3)
    (incident,) = wrapper.get_statistics()["incidents"]
    assert (incident["kind"], incident["severity"], incident["ranks"]) == ("oom", "warning", [0])
    assert "its batches run in 2 parts from here on" in incident["message"]
    assert incident["evidence"]["memory"]["parameters"] > 0
    assert incident["causes"][0].startswith("parameters ")
    (split_up,) = wrapper.monitor.commands.values()
    assert (split_up.origin, str(split_up.state), str(split_up.verdict)) == ("guard", "verified", "helped")
    assert split_up.as_dict()["actions"] == [{"action": "split_batch", "params": {"num_parts": 2}}]
    wrapper.model.capacity = None
    train(wrapper, RELAX_STEPS + 22, first=3)
    assert [record.actions[0].params["num_parts"] for record in wrapper.monitor.commands.values()] == [2, 1]
    (incident,) = wrapper.get_statistics()["incidents"]
    assert incident["state"] == "resolved"


def test_the_rows_say_in_how_many_parts_a_step_was_run() -> None:
    with Watch().installed() as watch:
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        for num_parts in (1, 2, 1):
            watch.actuators.in_force.ran_in_parts = num_parts
            optimizer.zero_grad()
            mse(model, batch_at(0)).backward()
            optimizer.step()
    assert [row.get("num_parts") for row in watch.rows] == [None, 2, None]
