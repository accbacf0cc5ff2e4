"""Without a GPU, Triton kernels run in Triton's interpreter: it has to be asked for at import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # tensors here are small, and numbers should not depend on the cores
if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core already
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU on this machine"))
