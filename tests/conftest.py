"""Without a GPU, Triton kernels run in Triton's interpreter: it has to be asked for at import."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tensors here are small, and numbers should not depend on the cores
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core already
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
# a shell starts its background jobs with SIGINT ignored; children inherit that, and then the tests
# that interrupt one wait for ever
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))


# Importing torch and torch._dynamo takes 5 s of a program that may take one itself. This one has
# done so, and forks for every line: a job in JSON, answered with the exit status.
SERVER = """
import json, os, runpy, sys
sys.modules["triton"] = None  # how it is imported is a matter of the files that are run
import torch, torch._dynamo
del sys.modules["triton"]
for line in sys.stdin:
    job = json.loads(line)
    if os.fork() == 0:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
for descriptor, name in enumerate((os.devnull, *job["outputs"])):
    os.dup2(os.open(name, os.O_RDWR), descriptor)
os.environ.clear()
os.environ.update(job["environment"])
sys.argv = job["command"]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def server():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        yield it
        it.stdin.close()


@pytest.fixture
def run_file(server, tmp_path):
    """run_file(path, *arguments): as `python path arguments`, without what this file has set."""

    def run(*command: str | Path):
        command = list(map(str, command))
        outputs = [tmp_path / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.write_text("")
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        job = {"command": command, "outputs": list(map(str, outputs)), "environment": environment}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(p.read_text() for p in outputs))

    return run
