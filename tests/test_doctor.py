"""``sosa doctor``: each planted mistake is found with its evidence, and a sound script has none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sosa_stream.cli import main
from sosa_stream.doctor import run
from sosa_stream.doctor.findings import Answer, Finding, Status, answer_of, lines, named, size
from sosa_stream.doctor.names import NAMES
from sosa_stream.doctor.rates import suggest, without_batches
from sosa_stream.doctor.seen_calls import Losses

TIMEOUT_SECONDS = 120.0
PLAIN = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    {data}
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    {model}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    {late}
    for epoch in range(100):
        for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
    raise AssertionError("the doctor should have left")
"""


def script(folder: Path, text: str = PLAIN, **parts: str) -> Path:
    """A file of the text, with each part put into its place."""
    text = dedent(text)
    for name in ("data", "model", "late"):
        text = text.replace("{" + name + "}", dedent(parts.get(name, "")).strip())
    path = folder / "train.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a script in this process, and gives the answers by check."""

    def look(path: Path, *only: str, steps: int = 4, arguments: tuple[str, ...] = ()) -> dict[str, Finding]:
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        result = tmp_path / "answers"
        result.unlink(missing_ok=True)
        torch.seed()  # as in a fresh process: another test may have set the one that the script sets
        order = {
            "result": str(result),
            "num_steps": steps,
            "seconds": 10.0,
            "only": only,
            "out": str(tmp_path),
            "script": [str(path), *arguments],
        }
        run.main([json.dumps(order)])
        events = [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]
        return {event["check"]: answer_of(event).finding for event in events if event["event"] == "answer"}

    return look


CHEAP = ("batches", "inputs", "labels", "loss", "gradients", "overfit", "learning_rate", "determinism", "memory")


def test_a_sound_script_has_neither_problem_nor_warning(look: Any, tmp_path: Path) -> None:
    found = look(script(tmp_path), *CHEAP)
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(CHEAP, Status.OK)
    assert abs(found["loss"].evidence["loss"] - found["loss"].evidence["expected"]) < 0.2
    assert found["loss"].evidence["expected"] == pytest.approx(1.0986, abs=1e-4)
    assert found["overfit"].evidence["tries"][0]["best"] < 0.6
    assert 1e-4 < found["learning_rate"].evidence["suggestion"] < 1.0
    assert (tmp_path / "lr_range.png").stat().st_size > 10_000
    tried = found["memory"].evidence["tried"]
    assert tried[0]["batch_size"] == 16
    assert tried[-1]["batch_size"] > 16


def test_the_scripts_own_weights_are_as_its_steps_have_left_them(look: Any, tmp_path: Path) -> None:
    keep = "import sys; sys.modules['kept_by_test'] = kept = type(sys)('kept'); kept.model = model"
    keep += "; kept.names = [n for n, _ in model.named_parameters()]; kept.after = []"
    keep += "\noptimizer.register_step_post_hook("
    keep += "lambda *_: kept.after.append([p.detach().clone() for p in model.parameters()]))"
    look(script(tmp_path, late=keep), "overfit", "learning_rate", "memory", "determinism")
    kept = sys.modules.pop("kept_by_test")
    for parameter, after in zip(kept.model.parameters(), kept.after[-1], strict=True):
        assert torch.equal(parameter, after)
    assert len(kept.after) == 4


FORWARD = "model.extra = nn.Linear(3, 3, bias=False)\nmodel.forward = lambda x: model[2](model[1](model[0](x)))"
OWN_RANDOMNESS = """
    rng = torch.Generator()
    kept = lambda out: torch.rand(out.shape, generator=rng) > 0.3
    model[1].register_forward_hook(lambda module, args, out: out * kept(out))
"""


@pytest.mark.parametrize(
    ("check", "status", "words", "parts"),
    [
        ("labels", "problem", "lie outside 0 to 2, 7 for one; there are 3 outputs", {"data": "y[5:200] = 7"}),
        ("inputs", "warning", "1 of 8 features never vary: 6 (always 3)", {"data": "x[:, 6] = 3.0"}),
        ("inputs", "warning", "not normalised: 2 (mean 50", {"data": "x[:, 2] = 500 + 60 * x[:, 2]"}),
        ("inputs", "problem", "NaN or infinite, in feature 4", {"data": "x[::3, 4] = float('nan')"}),
        ("loss", "problem", "a model that knows nothing has ln 3", {"model": "model[2].weight.data.mul_(200)"}),
        (
            *("gradients", "problem", "frozen, yet an optimizer has them: 0.weight, 0.bias"),
            {"model": "model[0].requires_grad_(False)"},
        ),
        ("gradients", "problem", "1 parameters get no gradient: extra.weight", {"model": FORWARD}),
        (
            *("gradients", "problem", "no optimizer steps them: 2.weight, 2.bias"),
            {"late": "optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)"},
        ),
        (
            *("gradients", "problem", "2 parameters of an optimizer get no gradient, of no model that ran"),
            {"late": "optimizer.add_param_group({'params': nn.Linear(3, 3).parameters()})"},
        ),
        ("gradients", "problem", "never fire: 1 (100%)", {"model": "model[0].bias.data.fill_(-100.0)"}),
        (
            *("batches", "problem", "all 4 batches are the same"),
            {"data": "x, y = x[:1].repeat(256, 1), y[:1].repeat(256)"},
        ),
        ("overfit", "problem", "one batch cannot be learned", {"data": "x.zero_(); y = torch.arange(256) % 3"}),
        (
            *("learning_rate", "warning", "is a rate at which the loss rises"),
            {"late": "optimizer.param_groups[0]['lr'] = 9.0"},
        ),
        (
            *("learning_rate", "warning", "the script's 100 is a rate at which the loss rises"),
            {"late": "optimizer.param_groups[0]['lr'] = 100.0"},
        ),
        (
            *("gradients", "problem", "3 updates left their gradients there"),
            {"late": "optimizer.zero_grad = lambda: None"},
        ),
        (
            *("labels", "warning", "targets are of the size 3e+05"),
            {
                "late": "mse_loss = F.mse_loss\n"
                "class F: cross_entropy = staticmethod(lambda outputs, y: mse_loss(outputs[:, 0], y + 3e5))"
            },
        ),
        (
            *("loss", "problem", "with its sign turned"),
            {"late": "class F: cross_entropy = staticmethod(lambda *each: -nn.functional.cross_entropy(*each))"},
        ),
        ("loss", "problem", "cross_entropy is given probabilities", {"model": "model.append(nn.Softmax(dim=1))"}),
        (
            *("labels", "warning", "64 labels are of 1 of 4 classes"),
            {"data": "y.zero_()", "model": "model[2] = nn.Linear(32, 4)"},
        ),
        ("determinism", "warning", "the script sets no seed", {}),
        ("determinism", "problem", "two passes over one batch from one seed give losses", {"model": OWN_RANDOMNESS}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_mistake_is_found(
    look: Any, tmp_path: Path, check: str, status: str, words: str, parts: dict[str, str]
) -> None:
    path = script(tmp_path, **parts)
    if "no seed" in words:
        path.write_text(path.read_text().replace("torch.manual_seed(0)", ""))
    found = look(path, check)[check]
    assert words in found.says
    assert found.status == status
    assert found.evidence
    assert found.advice or status == "problem"


def test_labels_that_fail_in_the_loss_are_named_and_the_traceback_stays(
    look: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = look(script(tmp_path, data="y += 1"), "labels", "gradients", "overfit")
    assert "3 for one; there are 3 outputs" in found["labels"].says
    assert "the labels count from 1: subtract 1" in found["labels"].advice
    assert found["overfit"].status == "unknown"
    told = capfd.readouterr().err
    assert "IndexError: Target 3 is out of bounds" in told
    assert "doctor" not in told


NANO = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(17, 16)
            self.drop = nn.Dropout(0.2)
            self.head = nn.Linear(16, 17, bias=False)
            self.table.weight = self.head.weight
            nn.init.normal_(self.head.weight, 0.0, 0.02)

        def forward(self, ids, targets):
            logits = self.head(self.drop(self.table(ids)))
            return logits, F.cross_entropy(logits.view(-1, 17), targets.reshape(-1), ignore_index=-1)

    def get_batch():
        ids = torch.randint(0, 17, (6, 9))
        return ids[:, :-1], ids[:, 1:]

    torch.manual_seed(1)
    model = Model()
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(50):
        try:
            for _ in range(2):
                _, loss = model(*get_batch())
                scaler.scale(loss / 2).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        except Exception:
            print("a loop that goes on whatever happens")
"""


def test_a_loop_with_accumulation_a_scaler_and_tied_weights_is_followed(look: Any, tmp_path: Path) -> None:
    found = look(script(tmp_path, NANO), "batches", "loss", "gradients", "overfit", "determinism", steps=3)
    assert {name for name, finding in found.items() if finding.status != "ok"} <= {"overfit"}, "its data is noise"
    assert found["batches"].evidence["num_passes"] == 6
    assert found["gradients"].evidence["num_parameters"] == 1
    assert found["overfit"].evidence["tries"][0]["first"] == pytest.approx(2.833 / 2, abs=0.05), (
        "the loss, not its scale"
    )


def test_two_optimizers_in_turns_keep_no_gradients(look: Any, tmp_path: Path) -> None:
    turns = """
        critic = nn.Linear(3, 1)
        other = torch.optim.SGD(critic.parameters(), lr=0.01)
        for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=16):
            other.zero_grad()
            critic(model(inputs).detach()).mean().backward()
            other.step()
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs), labels) - critic(model(inputs)).mean()).backward()
            optimizer.step()
    """
    found = look(script(tmp_path, late=turns), "gradients")["gradients"]
    assert "kept_gradients" in found.evidence
    assert found.evidence["kept_gradients"] == 0


def test_a_script_that_catches_everything_is_left_all_the_same(look: Any, tmp_path: Path) -> None:
    path = script(tmp_path, NANO)
    text = path.read_text(encoding="utf-8").replace("except Exception:", "except BaseException as error:")
    stop = (
        "caught = [*globals().get('caught', []), type(error).__name__]\n        if len(caught) > 3:\n            break"
    )
    path.write_text(text.replace('print("a loop that goes on whatever happens")', stop), encoding="utf-8")
    assert look(path, "loss", steps=1)["loss"].status == "ok"


def doctor(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sosa_stream.cli", "doctor", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


MAIN = """
    import argparse

    def main():
        import torch
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        parser.add_argument("--json", action="store_true")
        arguments = parser.parse_args()
        assert arguments.json
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr)
        try:
            for step in range(1000):
                x = torch.randn(8, 4)
                loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                print("step", step)
        finally:
            print("cleaned up")

    if __name__ == "__main__":
        main()
"""


def test_the_command_gives_json_alone_on_stdout_and_the_script_its_own_arguments(tmp_path: Path) -> None:
    script(tmp_path, MAIN)
    words = ("--json", "--steps", "3", "--out", "out", "--only", "loss,learning_rate,speed,environment")
    done = doctor(tmp_path, *words, "--", "train.py", "--lr", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [check["check"] for check in report["checks"]] == ["loss", "learning_rate", "speed", "environment"]
    assert report["num_steps"] == 3
    assert json.loads((tmp_path / "out" / "doctor.json").read_text(encoding="utf-8")) == report
    assert report["checks"][1]["evidence"]["script"] == 0.05
    tried = report["checks"][2]["evidence"]["tried"]
    assert set(tried) == {"amp_bfloat16", "double_batch"}
    assert all(each["seconds"] > 0.0 for each in tried.values())
    assert "cleaned up" in done.stderr
    assert "step 2" not in done.stderr, "it was left in its third step"


@pytest.mark.torchrun
def test_ranks_that_train_on_the_same_batches_are_told(tmp_path: Path) -> None:
    text = dedent(PLAIN).replace("optimizer = ", "model = nn.parallel.DistributedDataParallel(model)\noptimizer = ")
    text = text.replace("torch.manual_seed(0)", "torch.manual_seed(0)\ntorch.distributed.init_process_group('gloo')")
    script(tmp_path, text)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = ("--json", "--steps", "3", "--only", "batches,gradients,overfit", "--", "train.py")
    done = doctor(tmp_path, *words, launcher=launcher)
    report = json.loads(done.stdout)
    assert report["num_ranks"] == 2
    checks = {(check["check"], check["rank"]): check for check in report["checks"]}
    assert set(checks) == {("batches", 0), ("batches", 1), ("gradients", 0), ("gradients", 1), ("overfit", 0)}
    assert "rank 1 trains on samples of rank 0: 100% of them" in checks["batches", 0]["says"]
    assert checks["batches", 0]["status"] == "problem"
    assert checks["overfit", 0]["status"] == "ok"
    assert done.returncode == 1, "torchrun's own, whatever its ranks end with"


def test_a_script_that_fails_at_once_ends_with_1_and_its_traceback(tmp_path: Path) -> None:
    script(tmp_path, "raise RuntimeError('no data here')")
    done = doctor(tmp_path, "--only", "loss", "--", "train.py")
    assert done.returncode == 1
    assert "RuntimeError: no data here" in done.stderr
    assert "failed with RuntimeError" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no script given"),
        (("--only", "nonsense", "--", "train.py"), "there is no such check"),
        (("--steps", "0", "--", "train.py"), "--steps must be"),
        (("--seconds", "0", "--", "train.py"), "--seconds must"),
        (("--", "torchrun", "train.py"), "put torchrun first"),
    ],
)
def test_a_mistake_in_the_command_is_told_in_one_line(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *words]) == 2
    complaint = capsys.readouterr().err
    assert told in complaint
    assert complaint.count("\n") == 1


def test_answers_of_ranks_that_agree_are_told_once() -> None:
    def answer(check: str, status: Status, says: str, rank: int) -> Answer:
        return Answer(check=check, question="?", finding=Finding(status=status, says=says), rank=rank)

    answers = [
        *(answer("batches", Status.OK, f"loaded {rank}", rank) for rank in range(3)),
        *(answer("inputs", Status.PROBLEM, "NaN\x1b[31m", rank) for rank in (1, 2)),
        answer("inputs", Status.OK, "fine", 0),
        answer("memory", Status.OK, "enough", 0),
    ]
    assert lines(answers, 3) == [
        "ok       batches       loaded 0",
        "problem  inputs        NaN\\x1b[31m [rank 1, 2]",
        "ok       inputs        fine [rank 0]",
        "ok       memory        enough",
    ]


def test_every_check_is_in_the_table_once() -> None:
    assert len(set(NAMES)) == len(NAMES) == 12
    assert (named("abc"), named("abcdefgh"), size(1_500)) == ("a, b, c", "a, b, c, d, e, f and 2 more", "1.5 KB")


@pytest.mark.faults
def test_what_compiling_gains_is_measured_on_what_was_compiled(tmp_path: Path) -> None:
    script(tmp_path)
    done = doctor(tmp_path, "--json", "--only", "compile", "--seconds", "90", "--", "train.py")
    (check,) = json.loads(done.stdout)["checks"]
    assert check["status"] == "ok", check["says"]
    assert check["evidence"]["compile_seconds"] > 100 * check["evidence"]["seconds"], "a compiler has run"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "values"])
def test_a_loss_that_the_script_divides_itself_is_judged_by_one_target(reduction: str, kind: str) -> None:
    losses = Losses()
    outputs, classes = torch.zeros(8, 4), torch.tensor([0, 1, 2, 3, 0, -100, -100, -100])
    func, target, expected = {
        "classes": (F.cross_entropy, classes, math.log(4)),
        "probabilities": (F.cross_entropy, torch.full((8, 4), 0.25), math.log(4)),
        "values": (F.mse_loss, torch.full((8, 4), 3.0), 9.0),
    }[kind]
    losses.see(func, (outputs, target), {"reduction": reduction}, None, "")
    losses.see(func, (outputs, target), {"reduction": reduction}, func(outputs, target, reduction=reduction), "")
    assert losses.calls[0].value == pytest.approx(expected)


def test_the_batches_own_levels_do_not_hide_at_which_rate_the_loss_falls() -> None:
    rates = np.geomspace(1e-6, 10.0, 100)
    falls = 1.0 / (1.0 + (rates / 1e-2) ** 2)
    levels = np.array([5.0, 0.0, 9.0, 2.0, 7.0])[np.arange(100) % 5]
    assert np.allclose(without_batches(falls + levels, 5), falls + levels[:5].mean(), atol=1e-6)
    found = suggest(rates, without_batches(falls + levels, 5))
    assert found is not None
    assert 2e-3 < found[0] < 2e-2
