from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, NoTorch())

import importlib, pkgutil
import sosa_stream.cli, sosa_stream.daemon, sosa_stream.protocol, sosa_stream.replay, sosa_stream.web
import sosa_stream.engine
for package in (sosa_stream.daemon, sosa_stream.protocol, sosa_stream.replay, sosa_stream.cli, sosa_stream.web):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

import os, signal, tempfile, threading
read_end, write_end = os.pipe()

def stop_when_ready():
    with os.fdopen(read_end) as file:
        file.readline()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=stop_when_ready).start()
with tempfile.TemporaryDirectory() as home:
    code = sosa_stream.cli.main(
        ["daemon", "--home", home, "--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", "--ready-fd", str(write_end)]
    )
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_the_daemon_the_replay_and_the_command_line_work_where_torch_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
