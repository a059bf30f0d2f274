"""`sosa compare`: which run is worse, where and by what they differ, and the exit codes that a CI reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_pairing import curve, falling

from sosa_stream.cli import main
from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.detect.incidents import Group, Incident, IncidentState, Severity
from sosa_stream.errors import UsageError
from sosa_stream.protocol.actions import Action
from sosa_stream.report.compare import Comparison, Row, Standing, compare
from sosa_stream.report.story import Raised, Story
from sosa_stream.report.tables import write_tables
from sosa_stream.report.telling import tell
from sosa_stream.report.verdict import verdict


def story(name: str, losses: np.ndarray, **more: object) -> Story:  # type: ignore[type-arg]
    curves = {"loss": curve(losses)}
    told = Story(
        name=name,
        source=Path(f"{name}.csv"),
        kind="csv",
        num_steps=len(losses),
        first_step=0,
        last_step=len(losses) - 1,
        curves=curves,
    )
    return replace(told, **more)  # type: ignore[arg-type]


def incident(kind: str, step: int, run: str = "b") -> Incident:
    return Incident(
        id=f"i-{kind}",
        run=run,
        kind=kind,
        group=Group.LEARNING,
        severity=Severity.CRITICAL,
        state=IncidentState.OPEN,
        first_step=step,
        detected_step=step + 1,
        message=f"{kind} it is",
    )


def row(found: Comparison, what: str) -> Row:
    return next(row for row in found.rows if row.what == what)


@pytest.mark.parametrize(
    ("factor", "standing"),
    [(1.0, Standing.EVEN), (1.01, Standing.EVEN), (1.1, Standing.WORSE), (0.9, Standing.BETTER)],
)
def test_runs_are_told_apart_by_what_lies_beyond_noise_and_tolerance(factor: float, standing: Standing) -> None:
    found = compare([story("a", falling(0)), story("b", factor * falling(1))])
    assert found.worst is standing


def test_the_worst_of_several_runs_decides() -> None:
    found = compare([story("a", falling(0)), story("b", 0.8 * falling(1)), story("c", 1.2 * falling(2))])
    assert [each.standing for each in found.against] == [Standing.BETTER, Standing.WORSE]
    assert found.worst is Standing.WORSE


def test_what_ends_not_finite_is_worse_and_what_no_longer_does_is_better() -> None:
    broken = falling(1)
    broken[600:] = math.nan
    assert compare([story("a", falling(0)), story("b", broken)]).worst is Standing.WORSE
    assert compare([story("a", broken), story("b", falling(0))]).worst is Standing.BETTER
    assert compare([story("a", broken), story("b", broken)]).worst is Standing.UNKNOWN


def test_a_run_that_an_error_ended_is_worse_however_good_its_losses() -> None:
    raised = Raised(rank=1, host="h", step=400, type="RuntimeError", message="size mismatch", stack=())
    found = compare([story("a", falling(0)), story("b", 0.8 * falling(1)[:400], raised=(raised,))])
    assert found.worst is Standing.WORSE
    assert found.against[0].why == "RuntimeError on rank 1 at step 400 ended it"


def test_a_run_that_is_only_shorter_is_judged_over_what_both_have() -> None:
    found = compare([story("a", falling(0)), story("b", falling(1, 400))])
    assert (found.worst, found.against[0].last_common) == (Standing.EVEN, 399)


def test_a_run_that_takes_off_just_before_the_end_is_worse_however_wide_its_interval() -> None:
    first, second = falling(0, 1000), falling(1, 1000)
    second[950:] *= np.geomspace(1.5, 3000.0, 50)
    found = compare([story("a", first), story("b", second)])
    assert found.worst is Standing.WORSE
    assert "it lies above since step 9" in found.against[0].why
    recovered = falling(1, 1000)
    recovered[900:950] *= 100.0
    assert compare([story("a", first), story("b", recovered)]).worst is not Standing.WORSE


def test_a_run_without_a_step_is_told_as_such() -> None:
    found = compare([story("a", falling(0)), story("b", np.array([]))])
    assert found.worst is Standing.UNKNOWN
    assert found.against[0].why == "the two have no step in common: a has steps 0 to 899, b has no step"
    assert row(found, "steps").cells == ("900, to 899", "none")


def test_the_validation_loss_decides_where_there_is_enough_of_it() -> None:
    first, second = story("a", falling(0)), story("b", 0.9 * falling(1))
    for num, by in ((10, "loss"), (30, "eval_loss")):
        pair = [
            replace(each, curves={**each.curves, "eval_loss": curve(worse * falling(seed, num), every=30)})
            for seed, (each, worse) in enumerate(((first, 1.0), (second, 1.3)))
        ]
        assert compare(pair).against[0].column == by
    assert compare(pair).worst is Standing.WORSE
    assert compare(pair, by="loss").worst is Standing.BETTER


def test_a_column_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"a has no log/accuracy to compare by; it has loss"):
        compare([story("a", falling(0)), story("b", falling(1))], by="log/accuracy")


def test_where_runs_part_the_nearest_incident_is_named_and_whose_it_is() -> None:
    broken = falling(1)
    broken[350:] += 3.0
    later, ours = incident("loss_plateau", 700), incident("lr_jump", 349)
    found = compare([story("a", falling(0)), story("b", broken, incidents=(ours, later))])
    (lead,) = found.against[0].leads
    assert lead is not None
    assert (lead.incident.kind, lead.runs) == ("lr_jump", ("b",))
    both = compare([story("a", falling(0), incidents=(ours,)), story("b", broken, incidents=(ours,))])
    assert both.against[0].leads[0] is not None
    assert both.against[0].leads[0].runs == ("a", "b")


def test_the_table_has_what_was_recorded_and_nothing_else() -> None:
    fix = CommandRecord(
        id="c1",
        run="b",
        generation="g",
        incident="i",
        actions=(Action(action="rollback", params={"before_step": 350}),),
        confidence=1.0,
        state=CommandState.VERIFIED,
        reason="",
        applied_step=353,
        verdict=Verdict.HELPED,
    )
    plain = story("a", falling(0))
    full = story(
        "b",
        falling(1),
        kind="recording",
        mode="auto",
        hosts=("h",),
        versions={"torch": "2.6"},
        incidents=(incident("lr_jump", 350),),
        commands=(fix,),
    )
    full = replace(full, curves={**full.curves, "grad_norm": curve(np.full(900, 0.5)), "lr": curve(np.full(900, 0.1))})
    found = compare([plain, full])
    assert row(found, "mode").cells == ("-", "auto")
    assert row(found, "version of torch").cells == ("-", "2.6")
    assert row(found, "gradient norm, median").cells == ("-", "0.5")
    assert row(found, "learning rate, largest").cells == ("-", "0.1")
    assert row(found, "incidents").cells == ("-", "lr_jump at 350")
    assert row(found, "fixes").cells == ("-", "rollback at 353 (helped)")
    assert not row(found, "steps").differs
    assert "samples a second" not in [row.what for row in found.rows]


def test_runs_of_one_name_are_told_apart_by_their_sources() -> None:
    one, two = story("run", falling(0)), replace(story("run", falling(1)), source=Path("other.csv"))
    assert compare([one, two]).names == ("run.csv", "other.csv")
    assert compare([one, one]).names == ("run (1)", "run (2)")


def test_the_object_is_json_whatever_the_losses_are() -> None:
    broken = np.full(900, math.nan)
    for second in (broken, falling(1), falling(1, 3), falling(1) * 1e30):
        found = compare([story("a", falling(0)), story("b", second)])
        json.dumps(found.as_dict(), allow_nan=False)


def log_of(path: Path, losses: np.ndarray) -> str:  # type: ignore[type-arg]
    rows = [f"{step},{loss:.6f}" for step, loss in enumerate(losses)]
    path.write_text("\n".join(["step,loss", *rows]) + "\n")
    return str(path)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.2, 3), (0.8, 0)])
def test_the_exit_code_is_3_where_a_run_is_worse(
    factor: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [log_of(tmp_path / "a.csv", falling(0)), log_of(tmp_path / "b.csv", factor * falling(1))]
    assert main(["compare", *logs]) == code
    said = capsys.readouterr().out
    assert {1.0: "b is as good as a", 1.2: "b is worse than a", 0.8: "b is better than a"}[factor] in said


def test_a_picture_and_one_object_are_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    broken = falling(1)
    broken[350:] *= 50.0
    broken[600:] = math.nan
    logs = [log_of(tmp_path / f"{name}.csv", each) for name, each in (("a", falling(0)), ("b", broken))]
    assert main(["compare", *logs, "--out", str(tmp_path / "out"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert Path(told["picture"]).read_bytes().startswith(b"\x89PNG")
    assert (told["standing"], told["against"][0]["first_divergence"]) == ("worse", 350)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.csv"], "two runs or more"),
        (["a.csv", "nowhere"], "neither a file nowhere nor a run of that name"),
        (["a.csv", ""], "a RUN is empty"),
        (["a.csv", "a.csv", "--tolerance", "much"], "no percentage"),
        (["a.csv", "a.csv", "--by", "log/x"], "has no log/x"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log_of(tmp_path / "a.csv", falling(0, 100))
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_of_a_report_is_as_good_as_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = falling(1)
    broken[350:] *= 50.0
    logs = [Path(log_of(tmp_path / f"{name}.csv", each)) for name, each in (("a", falling(0)), ("b", broken))]
    for log in logs:
        told = tell(log)
        (tmp_path / log.stem).mkdir()
        write_tables(told, verdict(told), tmp_path / log.stem)
    said = []
    for suffix in (".csv", ""):
        assert main(["compare", *(str(log.with_suffix(suffix)) for log in logs), "--json"]) == 3
        (found,) = json.loads(capsys.readouterr().out)["against"]
        said.append((found["end"], found["first_divergence"], found["stretches"][0]["incident"]["kind"]))
    assert said[0] == said[1]


def test_a_folder_that_is_damaged_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diagnosis_report.json").write_text("{}")
    (tmp_path / "out" / "gradient_stats.csv").write_text("step,loss,total_norm,lr\n")
    assert main(["compare", str(tmp_path / "out"), str(tmp_path / "out")]) == 2
    assert "is no folder of sosa report" in capsys.readouterr().err


@pytest.mark.parametrize("tolerance", ["30", "30%"])
def test_the_tolerance_is_a_percentage(tolerance: str, tmp_path: Path) -> None:
    logs = [log_of(tmp_path / "a.csv", falling(0)), log_of(tmp_path / "b.csv", 1.2 * falling(1))]
    assert main(["compare", *logs]) == 3
    assert main(["compare", *logs, "--tolerance", tolerance]) == 0


def test_where_nothing_can_be_told_the_exit_code_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [log_of(tmp_path / "a.csv", falling(0)), log_of(tmp_path / "b.csv", falling(1, 3))]
    assert main(["compare", *logs]) == 1
    assert "too few" in capsys.readouterr().out
