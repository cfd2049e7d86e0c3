"""The rehearsal of tests that need a GPU still works: a few of them, in a process of their own."""

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.kit.native import ROOT

FEW = (
    "tests/test_pretended_device.py",
    "tests/models/test_dit.py",
    "tests/ops/test_gpu_bar.py::test_in_a_cuda_graph[triton_impl-gelu]",
    "tests/ops/test_gpu_bar.py::test_every_op_is_held_to_it",
    "tests/ops/test_gelu_tanh_launch.py::test_past_two_to_the_31_on_a_gpu",
    "tests/ops/test_ring_attention.py",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to play on")
def test_a_few_tests_for_gpus_are_rehearsed():
    pytest.importorskip("triton")
    pytest.importorskip("hunyuan_fast._C", reason="the native module is not built here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rehearse-gpu=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, *FEW], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "REHEARSAL" in done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15
