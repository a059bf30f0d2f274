"""``deploy/slurm/train.sbatch`` with a real daemon and without Slurm: small programs stand in for srun and scontrol."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon_process import DEADLINE_SECONDS, wait_until
from deployed import DEPLOY, ROOT, environment

SCRIPT = DEPLOY / "slurm" / "train.sbatch"
SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
TORCHRUN = """
import json, os, signal, sys
from pathlib import Path

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
told = Path(os.environ["TOLD"])
if "SOSA_DISABLE" not in os.environ:
    from daemon_process import RingAgent, wait_until
    from sosa_stream.config import load_settings
    from sosa_stream.protocol.keys import load_agent_keys

    settings = load_settings(env=os.environ)
    keys = load_agent_keys(Path(settings.daemon.keys))
    with RingAgent(settings.agent.daemon, settings.run, keys=keys) as agent:
        agent.add_hello()
        agent.add_frames(range(3))
        wait_until(agent.pump, "the job's daemon to take in what a rank has sent")
told.with_suffix(".new").write_text(json.dumps(sys.argv[1:]))
told.with_suffix(".new").rename(told)
if sys.argv[-1] == "until-sigterm":
    signal.sigwait([signal.SIGTERM])
    sys.exit(143)
sys.exit(7)
"""
"""Sends as a rank does, and ends with 7, or with 143 after SIGTERM."""


@contextmanager
def job(folder: Path, *arguments: str, **programs: str) -> Iterator[subprocess.Popen[str]]:
    """The script as Slurm starts it on the first node."""
    (folder / "torchrun.py").write_text(TORCHRUN, encoding="utf-8")
    stand_ins = {
        "srun": SRUN,
        "torchrun": f'exec python {folder / "torchrun.py"} "$@"',
        "scontrol": f'echo "$@" >>{folder / "scontrol"}',
        **programs,
    }
    variables = environment(folder / "bin", **stand_ins)
    variables |= {
        "HOME": str(folder),
        "PYTHONPATH": f"{variables['PYTHONPATH']}:{ROOT / 'tests'}",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NNODES": "2",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURMD_NODENAME": "127.0.0.1",
        "TOLD": str(folder / "told"),
    }
    command = ["bash", str(SCRIPT), "train.py", *arguments]
    with subprocess.Popen(command, env=variables, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def home(folder: Path) -> Path:
    return folder / "sosa-runs" / "77"


def test_the_daemon_of_a_job_is_there_before_its_ranks_and_ends_after_them(tmp_path: Path) -> None:
    with job(tmp_path, "--epochs", "3") as process:
        assert process.wait(3 * DEADLINE_SECONDS) == 7, "the job ends as the ranks did"
    assert (home(tmp_path) / "train-77" / "run.sosa").stat().st_size
    assert "ended with everything recorded" in (home(tmp_path) / "daemon.log").read_text()
    told = json.loads((tmp_path / "told").read_text())
    assert told[-5:] == ["-m", "sosa_stream.agent", "train.py", "--epochs", "3"]
    given = dict(zip(told[:-5:2], told[1:-5:2], strict=True))
    assert (given["--nnodes"], given["--nproc-per-node"], given["--rdzv-id"]) == ("2", "4", "77")
    assert given["--rdzv-endpoint"] == "127.0.0.1:20077"
    assert not (tmp_path / "scontrol").exists(), "a job that has ended is not put back"


def test_a_job_whose_time_is_up_ends_its_ranks_and_is_put_back_into_the_queue(tmp_path: Path) -> None:
    with job(tmp_path, "until-sigterm") as process:
        wait_until((tmp_path / "told").exists, "the ranks to run", seconds=3 * DEADLINE_SECONDS)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(3 * DEADLINE_SECONDS) == 143
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
    assert "ended with everything recorded" in (home(tmp_path) / "daemon.log").read_text()


def test_a_job_that_is_cancelled_ends_its_ranks_and_is_not_put_back(tmp_path: Path) -> None:
    with job(tmp_path, "until-sigterm") as process:
        wait_until((tmp_path / "told").exists, "the ranks to run", seconds=3 * DEADLINE_SECONDS)
        process.terminate()
        assert process.wait(3 * DEADLINE_SECONDS) == 143
    assert not (tmp_path / "scontrol").exists()


def test_a_daemon_that_does_not_start_keeps_no_job_from_training(tmp_path: Path) -> None:
    with job(tmp_path, sosa="echo no such luck >&2; exit 2") as process:
        assert process.wait(3 * DEADLINE_SECONDS) == 7
        assert process.stderr is not None
        assert "training goes on unwatched" in process.stderr.read()
    assert (tmp_path / "told").exists()
