"""Real torchrun jobs for the tests: started, watched through what they leave on disk, and ended by their pids."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sosa_stream.cli.records import read_records
from sosa_stream.errors import SosaError
from sosa_stream.protocol.messages import Ack, AgentMessage, MetricFrame
from sosa_stream.protocol.recording import decode_record, read_recording

SCRIPT = Path(__file__).with_name("small_training.py")
RUN = "job"
DEADLINE_SECONDS = 60.0
FINAL_STATES = {"verified", "reverted", "rejected", "expired", "aborted"}

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = DEADLINE_SECONDS) -> T:
    """The first true value of ``condition``; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


class Job:
    """One torchrun job of two ranks under the agent, or without it; on two nodes, of as many launchers.

    ``home`` holds the store and the recordings, ``out`` what the script writes, ``log`` what everybody says.
    ``process`` is the launcher, of node 0 where there are more.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        inject: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        agent: bool = True,
        script: Path = SCRIPT,
        nodes: int = 1,
        ranks_per_node: int = 2,
        begin_with: int | None = None,
    ) -> None:
        self.folder, self.home, self.out = folder, folder / "home", folder / "out"
        self.log_path = folder / "job.log"
        self.out.mkdir(parents=True)
        self._settings = dict(settings or {})
        self.run = self._settings.get("SOSA_RUN", RUN)
        self.world_size = nodes * ranks_per_node
        meet = ["--standalone"]
        if nodes > 1:
            meet = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
        words = ["--nproc-per-node", str(ranks_per_node), *launcher]
        if agent:
            words += ["-m", "sosa_stream.agent", *(word for fault in inject for word in ("--inject", fault))]
        words += [str(script), "--out", str(self.out), *arguments]
        # node 0 keeps the rendezvous: else whoever comes first does, and takes it along when it is killed
        which = [["--node-rank", str(node), "--rdzv-conf", f"is_host={int(node == 0)}"] for node in range(nodes)]
        which = which if nodes > 1 else [[]]
        self._commands = [[sys.executable, "-m", "torch.distributed.run", *meet, *one, *words] for one in which]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.join(len(self._commands) if begin_with is None else begin_with)
        self.process = self.processes[0]

    def join(self, num: int = 1) -> None:
        """Start the launchers of so many more nodes."""
        with self.log_path.open("ab") as log:
            self.processes += [
                subprocess.Popen(
                    command,
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command in self._commands[len(self.processes) :][:num]
            ]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
        fixed = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "SOSA_HOME": str(self.home), "SOSA_RUN": RUN}
        return {**kept, **fixed, **self._settings}

    # -- what it does --------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """What the script itself has written, a line a step."""
        path = self.out / f"steps-rank{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def num_steps(self) -> int:
        return len(self.steps())

    def wait_step(self, step: int) -> None:
        self.wait(lambda: self.num_steps() > step, f"step {step}")

    def wait_more_steps(self, num: int) -> None:
        """Until the script has gone on for ``num`` steps from now."""
        self.wait_step(self.num_steps() + num)

    def wait(self, condition: Callable[[], T], what: str) -> T:
        """Like `wait_for`, with what the job said if it does not come true."""
        try:
            return wait_for(lambda: condition() or self._fail_if_ended(condition, what), what)
        except AssertionError as error:
            daemon = self.daemon_log[-3000:]
            raise AssertionError(f"{error}\n--- job:\n{self.log[-6000:]}\n--- daemon:\n{daemon}") from None

    def _fail_if_ended(self, condition: Callable[[], T], what: str) -> T:
        if self.process.poll() is not None and not condition():
            raise AssertionError(f"the job ended with {self.process.returncode} before {what}")
        return condition()

    def tell_to_finish(self) -> None:
        (self.out / "finish").touch()

    def finish(self, *, code: int = 0) -> None:
        """Tell it to finish, and wait until it has."""
        self.tell_to_finish()
        self.ended(code=code)

    def ended(self, *, code: int = 0) -> None:
        """Wait for its end, which is with this exit code."""
        try:
            codes = [process.wait(DEADLINE_SECONDS) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job does not end\n{self.log[-6000:]}") from None
        assert set(codes) == {code}, f"ended with {codes}\n{self.log[-6000:]}"

    def results(self) -> list[dict[str, Any]]:
        """What the script left on each rank."""
        return [json.loads((self.out / f"result-rank{rank}.json").read_text()) for rank in range(2)]

    def digest(self) -> str:
        """The digest of parameters and optimizer state at the end, which is the same on both ranks."""
        first, second = (result["digest"] for result in self.results())
        assert first == second, "the ranks have drifted apart"
        return first

    # -- what is said of it --------------------------------------------------------------------------------------

    def sosa(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sosa_stream.cli", *words, "--home", str(self.home)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
            check=False,
        )

    def records(self, what: str) -> list[dict[str, Any]]:
        """What `sosa incidents --json` or `sosa commands --json` prints, without a process for each look."""
        try:
            return read_records(argparse.Namespace(home=self.home, run=None), what)
        except SosaError:  # no store yet
            return []

    def incidents(self, *, serious: bool = True) -> list[dict[str, Any]]:
        """Its incidents, without those that are only worth knowing."""
        found = [incident for incident in self.records("incidents") if incident["run"] == self.run]
        return [incident for incident in found if not serious or incident["severity"] != "info"]

    def commands(self, *states: str) -> list[dict[str, Any]]:
        found = [command for command in self.records("commands") if command["run"] == self.run]
        return [command for command in found if not states or command["state"] in states]

    def wait_command(self, *states: str) -> dict[str, Any]:
        """The first command in one of these states, or any, once there is one."""
        return self.wait(lambda: self.commands(*states), f"a command that is {' or '.join(states) or 'there'}")[0]

    def recorded(self) -> list[AgentMessage]:
        """Everything in the recording, in its order."""
        path = self.home / self.run / "run.sosa"
        return [decode_record(payload) for _, payload in read_recording(path)] if path.exists() else []

    def acks(self, command: str, state: str) -> list[Ack]:
        return [
            event
            for event in self.recorded()
            if isinstance(event, Ack) and event.command == command and event.state == state
        ]

    def applied_at(self, command: str) -> dict[int, int]:
        """The tick at which each rank says that it applied a command."""
        return {ack.header.rank: ack.tick for ack in self.acks(command, "applied")}

    def recorded_steps(self) -> dict[tuple[str, int], list[int]]:
        """The steps in the recording, of each generation and rank, in their order."""
        steps: dict[tuple[str, int], list[int]] = {}
        for event in self.recorded():
            if isinstance(event, MetricFrame):
                key = (event.header.generation, event.header.rank)
                steps.setdefault(key, []).extend(event.steps.tolist())
        return steps

    # -- its embedded daemon -------------------------------------------------------------------------------------

    @property
    def daemon_log(self) -> str:
        path = self.home / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def daemon_pids(self) -> list[int]:
        return [pid for pid, words in processes_of(self.folder) if words[2:4] == ["sosa_stream.cli", "daemon"]]

    def wait_daemon(self, *, other_than: int = 0) -> int:
        """The pid of the embedded daemon, which has bound its ports."""
        num_before = self.daemon_log.count("metrics come in at") if other_than == 0 else 0

        def found() -> int:
            pids = [pid for pid in self.daemon_pids() if pid != other_than]
            return pids[0] if pids and self.daemon_log.count("metrics come in at") >= num_before else 0

        return self.wait(found, "an embedded daemon")

    def addresses(self) -> list[tuple[str, str]]:
        """Where its daemons, one after the other, said that they can be found: metrics, HTTP."""
        return re.findall(r"metrics come in at (tcp://[\d.:]+), http://([\d.:]+)/metrics", self.daemon_log)

    def metric(self, name: str, **labels: str) -> float:
        return read_metric(self.addresses()[-1][1], name, **labels)

    # -- its end -------------------------------------------------------------------------------------------------

    def rank_pid(self, rank: int) -> int:
        return self.steps(rank)[-1]["pid"]

    def left_processes(self) -> list[tuple[int, list[str]]]:
        return processes_of(self.folder)

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid, _ in processes_of(self.folder):
            kill(pid)


def processes_of(folder: Path) -> list[tuple[int, list[str]]]:
    """The processes that were given ``folder`` as an argument or in a variable: pid and arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            arguments = (process / "cmdline").read_bytes()
            given = arguments + b"\0" + (process / "environ").read_bytes()
            if f"{folder}/".encode() in given and int(process.name) != os.getpid():
                found.append((int(process.name), arguments.decode(errors="replace").split("\0")))
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    assert pid > 1, "not a process, but all of ours"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def free_port() -> int:
    """For a launcher that must be told one before it is there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def read_metric(http: str, name: str, **labels: str) -> float:
    """The sum of the samples of a daemon that have these labels."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as response:
        text = response.read().decode()
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            has = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            total += float(match[3]) if labels.items() <= has.items() else 0.0
    return total
