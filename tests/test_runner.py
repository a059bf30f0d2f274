"""``python -m sosa_stream.agent script.py``: the script cannot tell, whatever it does, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

DEADLINE_SECONDS = 60.0


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a space in its name, in which scripts are written and started."""
    folder = tmp_path / "my scripts"
    folder.mkdir()
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
    return path


def _environment(folder: Path, extra: dict[str, str] | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SOSA_", "PYTHON"))}
    return {**kept, "SOSA_HOME": str(folder.parent / "home"), "SOSA_MODE": "observe", **(extra or {})}


FRAME_LINES = (
    "sosa: watching run ",
    "sosa: 1 incident(s) in this run: ",
    "sosa: no optimizer has stepped in this process",
)


def run(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Plain Python, in ``folder``."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=_environment(folder, env),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )


def watched(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The agent's run, without the lines on stderr at its start and end: name, incidents, that nothing trained."""
    done = run(folder, "-m", "sosa_stream.agent", *words, env=env)
    lines = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in lines if not line.startswith(FRAME_LINES))
    return done


def same(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    """The same words to plain Python and to us."""
    return run(folder, *words), watched(folder, *words)


SHOW = """
    import sys
    print(sys.argv)
    print(sys.path[0])
    print(__name__, __file__, __package__, __builtins__.__class__)
    print(sys.modules["__main__"].__dict__ is globals())
    print(sorted(name for name in globals() if name not in ("__cached__", "__annotations__")))
    import sibling
    print(sibling.VALUE)
"""


@pytest.mark.parametrize("words", [["./show.py", "--lr", "0.1", "-x"], ["sub/show.py", "-m", "x"]])
def test_argv_path_name_file_and_siblings_are_as_under_plain_python(here: Path, words: list[str]) -> None:
    for folder in (here, here / "sub"):
        write(folder, "show.py", SHOW)
        write(folder, "sibling.py", f"VALUE = {folder.name!r}")
    plain, ours = same(here, *words)
    assert plain.returncode == 0, plain.stderr
    assert (ours.stdout.replace("'__loader__', ", ""), ours.stderr, ours.returncode) == (
        plain.stdout.replace("'__loader__', ", ""),
        "",
        0,
    )


@pytest.mark.parametrize("name", ["package", "package.inner"])
def test_a_module_runs_as_with_python_m(here: Path, name: str) -> None:
    show = """
        import sys
        from . import sibling
        print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__.name, sibling.VALUE)
    """
    write(here, "package/__init__.py", "")
    write(here, "package/sibling.py", "VALUE = 7")
    write(here, "package/__main__.py", show)
    write(here, "package/inner.py", show)
    plain, ours = same(here, "-m", name, "--lr", "0.1")
    assert plain.returncode == 0, plain.stderr
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, "", 0)


def test_the_scripts_annotations_are_its_own(here: Path) -> None:
    """Compiled from a file of ours, a script would inherit our ``from __future__ import annotations``."""
    write(here, "typed.py", "def f(x: int): ...\nprint(f.__annotations__)\n")
    plain, ours = same(here, "typed.py")
    assert ours.stdout == plain.stdout == "{'x': <class 'int'>}\n"


# -- how it ends -------------------------------------------------------------------------------------------------------

RAISES = {
    "plain": """
        def inner(x):
            return 1 / x


        inner(0)
    """,
    "chained": """
        def inner():
            try:
                {}["key"]
            except KeyError as error:
                raise RuntimeError("no key") from error


        inner()
    """,
    "through torch": """
        import torch

        parameter = torch.nn.Parameter(torch.ones(2))


        def fail(grad):
            raise ValueError("in a hook")


        parameter.register_hook(fail)
        parameter.sum().backward()
    """,
    "in a closure": """
        import torch

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)


        def closure():
            raise ValueError("in the closure")


        optimizer.step(closure)
    """,
    "syntax": """
        print("never"
        x = = 1
    """,
}


@pytest.mark.parametrize("kind", list(RAISES))
def test_a_script_that_raises_shows_the_traceback_of_plain_python(here: Path, kind: str) -> None:
    write(here, "script.py", RAISES[kind])
    plain, ours = same(here, "script.py")
    assert plain.returncode == 1
    assert (ours.stderr, ours.stdout, ours.returncode) == (plain.stderr, plain.stdout, 1)


@pytest.mark.parametrize(
    ("argument", "code", "text"), [("3", 3, ""), ("'text'", 1, "text\n"), ("None", 0, ""), ("0", 0, "")]
)
def test_sys_exit_passes_through(here: Path, argument: str, code: int, text: str) -> None:
    write(here, "script.py", f"import sys\nsys.exit({argument})\n")
    ours = watched(here, "script.py")
    assert (ours.returncode, ours.stderr) == (code, text)


def test_atexit_functions_of_the_script_run_and_its_output_is_whole(here: Path) -> None:
    write(here, "script.py", "import atexit\natexit.register(lambda: print('last'))\nprint('first', end=' ')\n")
    ours = watched(here, "script.py")
    assert (ours.stdout, ours.stderr, ours.returncode) == ("first last\n", "", 0)


def test_ctrl_c_ends_the_script_as_it_ends_under_plain_python(here: Path) -> None:
    write(
        here,
        "script.py",
        """
        import atexit, signal
        atexit.register(lambda: print("cleaned up"))
        print("not flushed yet", end=" ")
        signal.raise_signal(signal.SIGINT)  # from outside it would strike anywhere, and no two tracebacks be alike
        """,
    )
    plain, ours = same(here, "script.py")
    assert (plain.returncode, plain.stdout) == (-signal.SIGINT, "not flushed yet cleaned up\n")
    assert "KeyboardInterrupt" in plain.stderr
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.py"], "cannot run 'absent.py': No such file or directory"),
        (["-m", "no_such_module"], "there is no module 'no_such_module' that can be run"),
        (["--inject", "nan_bach@3", "script.py"], "--inject nan_bach@3: unknown kind 'nan_bach'"),
        (["--inject=nan_batch@x", "script.py"], "--inject nan_batch@x: write the step as"),
        (["--inject"], "--inject needs a value"),
        (["--unknown", "script.py"], "unknown option --unknown"),
        ([], "no script given"),
        (["", "data"], "no script given"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_sentence_and_exit_code_2(
    here: Path, words: list[str], message: str
) -> None:
    write(here, "script.py", "print('ran')")
    ours = watched(here, *words)
    assert ours.returncode == 2
    assert ours.stdout == ""
    first, *rest = ours.stderr.splitlines()
    assert message in first
    assert first.startswith("sosa: ")
    assert not rest or rest[0].startswith("usage: ")


@pytest.mark.parametrize(
    ("env", "config", "message"),
    [
        ({"SOSA_MODE": "bold"}, "", "SOSA_MODE must be one of observe, suggest, auto, not 'bold'"),
        ({"SOSA_MOOD": "auto"}, "", "unknown variable SOSA_MOOD; did you mean SOSA_MODE"),
        ({"SOSA_CONFIG": "absent.toml"}, "", "cannot read absent.toml"),
        ({"SOSA_CONFIG": "sosa.toml"}, "mode = ", "sosa.toml is not TOML"),
        ({"SOSA_CONFIG": "sosa.toml"}, "[detect.loss_spikes]\nenabled = false", "did you mean loss_spike"),
    ],
)
def test_a_mistake_in_the_settings_costs_the_watching_and_never_the_training(
    here: Path, env: dict[str, str], config: str, message: str
) -> None:
    write(here, "script.py", "print('ran')")
    write(here, "sosa.toml", config)
    ours = watched(here, "script.py", env=env)
    assert (ours.returncode, ours.stdout) == (0, "ran\n")
    (line,) = ours.stderr.splitlines()
    assert message in line
    assert line.startswith("sosa: ")
    assert line.endswith("; training goes on unwatched")
    assert not (here.parent / "home").exists()


def test_a_mistyped_webhook_costs_the_notifications_alone(here: Path) -> None:
    write(here, "train.py", TRAIN)
    ours = watched(here, "train.py", env={"SOSA_NOTIFY": "hooks.example.com/secret"})
    assert (ours.returncode, ours.stderr.splitlines()) == (
        0,
        [
            "sosa: daemon.notify (SOSA_NOTIFY) must be http:// or https:// addresses; one is a text that is no URL; "
            "nobody will be notified"
        ],
    )
    assert list((here.parent / "home").glob("train-*/run.sosa")), "the daemon of the job took no offence either"


@pytest.mark.parametrize("env", [{"SOSA_NOTIFY": "hooks.example.com"}, {"SOSA_CONFIG": "absent.toml"}])
def test_a_daemon_that_a_person_starts_does_not_run_with_wrong_settings(here: Path, env: dict[str, str]) -> None:
    done = run(here, "-m", "sosa_stream.cli", "daemon", env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("sosa: ")


def test_help_is_shown_on_stdout(here: Path) -> None:
    ours = watched(here, "--help")
    assert ours.returncode == 0
    assert ours.stdout.startswith("usage: python -m sosa_stream.agent")


def test_sosa_disable_only_runs_the_script(here: Path) -> None:
    write(here, "script.py", "import sys\nprint('torch' in sys.modules, 'zmq' in sys.modules)\nsys.exit(4)\n")
    # Even wrong settings are not looked at: whoever switches it off wants it out of the way.
    ours = watched(here, "script.py", env={"SOSA_DISABLE": "1", "SOSA_MODE": "bold"})
    assert (ours.returncode, ours.stdout, ours.stderr) == (4, "False False\n", "")
    assert not (here.parent / "home").exists()


# -- real scripts ------------------------------------------------------------------------------------------------------

TRAIN = """
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    print([p.detach().numpy().tobytes().hex() for p in model.parameters()])
"""


def test_a_training_script_computes_the_same_bits_and_is_recorded(here: Path) -> None:
    write(here, "train.py", TRAIN)
    plain, ours = same(here, "train.py")
    assert (ours.stdout, ours.returncode) == (plain.stdout, 0), ours.stderr
    (recording,) = (here.parent / "home").glob("train-*/run.sosa")
    assert recording.stat().st_size > 100


def _daemons(home: Path) -> list[int]:
    """Processes that were told to keep their state in ``home``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(home).encode() in command and b"daemon" in command:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", ["1 / 0", "import os; os.kill(os.getpid(), 9)"])
def test_no_daemon_outlives_the_script_however_it_ends(here: Path, ending: str) -> None:
    write(here, "train.py", dedent(TRAIN) + ending)
    watched(here, "train.py")  # its pipes are read to their end: nobody holds them open any more
    deadline = time.monotonic() + DEADLINE_SECONDS
    while _daemons(here.parent / "home"):
        assert time.monotonic() < deadline, "the daemon is still there"
        time.sleep(0.05)


def test_forked_data_loader_workers_run_and_end_cleanly(here: Path) -> None:
    write(
        here,
        "train.py",
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = TensorDataset(torch.randn(64, 4))
        for epoch in range(2):
            for (x,) in DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork"):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        print("done")
        """,
    )
    ours = watched(here, "train.py")
    assert (ours.stdout, ours.stderr, ours.returncode) == ("done\n", "", 0)


def test_processes_spawned_by_the_script_find_its_functions(here: Path) -> None:
    write(
        here,
        "script.py",
        """
        import multiprocessing


        def square(x):
            return x * x


        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                print(pool.map(square, [1, 2, 3]))
        """,
    )
    ours = watched(here, "script.py")
    assert (ours.stdout, ours.stderr, ours.returncode) == ("[1, 4, 9]\n", "", 0)


def test_an_injected_fault_is_carried_out_and_told_as_what_it_is(here: Path) -> None:
    write(here, "train.py", TRAIN)
    ours = watched(here, "--inject", "exception@5", "train.py")
    assert ours.returncode == 1
    assert re.search(r"RuntimeError: injected by exception@5", ours.stderr)
    assert "sosa_stream" not in ours.stderr


def test_a_daemon_that_cannot_be_reached_is_no_reason_to_fail(here: Path) -> None:
    write(here, "train.py", TRAIN)
    plain = run(here, "train.py")
    # Port 9 discards: nobody answers there.
    ours: Any = watched(here, "train.py", env={"SOSA_DAEMON": "tcp://127.0.0.1:9"})
    assert (ours.stdout, ours.returncode) == (plain.stdout, 0)
    assert ours.stderr == (
        "sosa: the daemon tcp://127.0.0.1:9 never answered (address, keys?): nobody watched this run\n"
    )


def test_a_webhook_that_cannot_be_reached_is_told_in_one_line_at_the_end(here: Path) -> None:
    write(here, "train.py", dedent(TRAIN).replace(".mean()", ".mean().mul(float('nan') if step > 15 else 1.0)"))
    ours = watched(here, "train.py", env={"SOSA_NOTIFY": "http://127.0.0.1:9/secret"})
    assert ours.returncode == 0
    told = [line for line in ours.stderr.splitlines() if "127.0.0.1:9" in line]
    assert len(told) == 1, ours.stderr
    assert re.fullmatch(r"sosa: http://127.0.0.1:9/… was not told of a critical incident: .*refused", told[0])
    assert "secret" not in ours.stderr


def test_a_daemon_whose_keys_are_not_there_is_told_in_a_sentence(here: Path) -> None:
    write(here, "script.py", "print('ran')")
    ours = watched(here, "script.py", env={"SOSA_DAEMON": "tcp://127.0.0.1:9", "SOSA_DAEMON_KEYS": "absent"})
    assert (ours.stdout, ours.returncode) == ("ran\n", 0)
    (line,) = ours.stderr.splitlines()
    assert line.startswith("sosa: ")
    assert line.endswith("; training goes on unwatched")


def test_a_script_that_waits_for_all_its_children_does_not_wait_for_our_daemon(tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        """
import os, time, torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(200):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    time.sleep(0.01)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
print("waited")
"""
    )
    env = {**os.environ, "SOSA_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "sosa_stream.agent", str(script)], env=env, capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"waited\n"), done.stderr
    assert b"watching run" in done.stderr
