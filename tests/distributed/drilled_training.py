"""A DDP script in which a process fault strikes one rank at a step, or in which ranks pause as healthy runs do.

torchrun --standalone --nproc-per-node 2 drilled_training.py --out DIR --fault KIND@STEP --rank 1

It trains until the file ``finish`` is there. With ``--resume`` it begins with the newest checkpoint of that folder,
as a script does that is meant to be restarted.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sosa_stream.agent import latest_checkpoint, load_checkpoint

PAUSE_SECONDS = 7.0


class SlowFile(io.BytesIO):
    def write(self, data: object) -> int:
        if not self.tell():
            time.sleep(PAUSE_SECONDS)
        return super().write(data)  # type: ignore[arg-type]


class Interference(Exception):
    """Raised in the training thread by another one."""


def extra_all_reduce() -> None:
    dist.all_reduce(torch.ones(1), group=OTHER_GROUP[0])


def sleep_for_ever() -> None:
    threading.Event().wait()


def hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(3600)


def raise_error() -> None:
    raise ValueError("no such sample")


def raise_from_another_thread() -> None:
    training = ctypes.c_ulong(threading.get_ident())
    raised = ctypes.py_object(Interference)
    thread = threading.Thread(target=ctypes.pythonapi.PyThreadState_SetAsyncExc, args=(training, raised))
    thread.start()
    thread.join()


def segfault() -> None:
    ctypes.string_at(0)


def evaluate() -> None:
    time.sleep(PAUSE_SECONDS)


def save() -> None:
    torch.save({"weights": torch.ones(4)}, SlowFile())


def compute() -> None:
    matrix = torch.ones(200, 200)
    until = time.monotonic() + PAUSE_SECONDS
    while time.monotonic() < until:
        matrix @ matrix


def signals_itself(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


OTHER_GROUP: list[dist.ProcessGroup] = []
STRIKES: dict[str, Callable[[], None]] = {
    "exception": raise_error,
    "async_exception": raise_from_another_thread,
    "sigint": signals_itself(signal.SIGINT),
    "sigterm": signals_itself(signal.SIGTERM),
    "sigkill": signals_itself(signal.SIGKILL),
    "sigstop": signals_itself(signal.SIGSTOP),
    "abort": os.abort,
    "segfault": segfault,
    "gil": hold_the_gil,
    "sleep": sleep_for_ever,
    "extra_all_reduce": extra_all_reduce,
    "evaluate": evaluate,
    "save": save,
    "compute": compute,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fault", default="none@0")
    parser.add_argument("--rank", type=int, default=1, help="of the process that is struck")
    parser.add_argument("--when-told", action="store_true", help="not at a step, but once the file `strike` is there")
    parser.add_argument("--resume", type=Path, metavar="FOLDER")
    parser.add_argument("--once", action="store_true", help="only in the job's first start")
    arguments = parser.parse_args()
    if arguments.once and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        arguments.fault = "none@0"
    kind, _, at = arguments.fault.partition("@")
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    OTHER_GROUP.append(dist.new_group(list(range(dist.get_world_size()))))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    step = 0
    if arguments.resume is not None and (path := latest_checkpoint(arguments.resume)) is not None:
        step = load_checkpoint(path, model, optimizer).step or 0
    with (arguments.out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        while True:
            now = (arguments.out / "strike").exists() if arguments.when_told else step == int(at)
            if now and rank == arguments.rank and kind in STRIKES:
                lines.write(json.dumps({"step": step, "pid": os.getpid(), "struck_at": time.time()}) + "\n")
                STRIKES[kind]()
            inputs = torch.randn(16, 8)
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lines.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time()}) + "\n")
            time.sleep(0.004)
            step += 1
            told = torch.tensor([float((arguments.out / "finish").exists())])
            dist.all_reduce(told)
            if told.item():
                break
    OTHER_GROUP.clear()  # gloo's threads wait for ever in the destructor of a group that outlives the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
