"""The page of results: what it shows, what it calls unverified, and that it is up to date."""

import os
import subprocess
from dataclasses import replace

import pytest

from benchmarks.kit.discover import ROOT
from benchmarks.kit.record import RecordError, dumps
from benchmarks.kit.summary import PAGE, committed_results, gpu_implementations, render
from tests.benchmarks.fakes import measurement, result, timing

PATH = "benchmarks/results/cpu-a-processor-r-2-cores/scale.json"
GPU_PATH = "benchmarks/results/nvidia-h200/scale.json"
NAMES = {"scale": ["cuda_impl", "triton_impl"]}


def git(folder, *args):
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *args], check=True, env=environment)


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / PATH).parent.mkdir(parents=True)
    (tmp_path / PATH).write_text(dumps(result()))
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one result")
    return tmp_path


def test_only_committed_results_are_shown(checkout):
    changed = dumps(result(op="changed"))
    (checkout / PATH).write_text(changed)
    (checkout / PATH).with_name("new.json").write_text(changed)
    git(checkout, "add", ".")
    assert committed_results(checkout) == {PATH: result()}


def test_outside_of_a_checkout_it_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="only committed results are shown"):
        committed_results(tmp_path)


def test_a_committed_file_that_is_no_result_is_refused(checkout):
    (checkout / PATH).write_text("{}")
    git(checkout, "commit", "-q", "-a", "-m", "broken")
    with pytest.raises(RecordError, match=r"scale\.json: version must be 1"):
        committed_results(checkout)


def test_a_row_shows_ours_beside_the_best_peer_and_the_floor():
    page = render({PATH: result()}, {})
    row = "| scale 256p-33f (L=8) float32, forward | cpu_impl | 2.00 | eager | 4.00 | 2.00 | 50% |"
    assert row in page.splitlines()
    assert "## A Processor (R) (cpu, 2 cores)" in page
    assert "`python -m benchmarks scale` at 0123456789" in page
    assert "`cpu_impl` takes 1.00 of the time of both alone" in page
    assert "../benchmarks/results/cpu-a-processor-r-2-cores/scale.png" in page


def test_memory_of_a_whole_is_shown_where_it_was_counted():
    timings = [timing("hunyuan_fast", answers=True, kept_mib=20.5), timing("diffusers", "peer")]
    m = measurement(function="block", timings=timings, best_peer="diffusers")
    page = render({PATH: result(op="dit_blocks", measurements=[m])}, {}).splitlines()
    head = page.index("| case | MiB | hunyuan_fast | diffusers |")
    assert page[head + 2] == "| block 256p-33f (L=8) float32, forward | kept | 20.5 |  |"
    assert page[head + 3] == ""
    assert "| MiB |" not in render({PATH: result(measurements=[m])}, {})
    assert "| MiB |" not in render({PATH: result(op="dit_blocks")}, {})


def test_a_shared_machine_is_called_one():
    assert "shared" not in render({PATH: result(neighbours=0.05)}, {})
    assert "**The machine was shared:** other processes took 40%" in render(
        {PATH: result(neighbours=0.4)}, {}
    )


def test_kernels_without_a_gpu_result_are_unverified():
    page = render({PATH: result()}, NAMES)
    assert "| scale | cuda_impl | unverified: no committed result on a GPU |" in page
    assert "| scale | triton_impl | unverified: no committed result on a GPU |" in page


def test_a_page_without_results_says_so():
    assert "No result is committed yet" in render({}, NAMES)
    assert "No result is committed yet" not in render({PATH: result()}, NAMES)


def test_a_gpu_result_verifies_what_it_timed():
    machine = replace(result().machine, device="NVIDIA H200", arch="sm_90", driver="570.1")
    timings = [timing("cuda_impl", answers=True, peak_mib=1.0)]
    kept = result(machine=machine, measurements=[measurement(timings=timings, best_peer=None)])
    page = render({PATH: result(), GPU_PATH: kept}, NAMES)
    assert "| scale | cuda_impl | unverified" not in page
    assert "| scale | triton_impl | unverified" in page
    assert "driver 570.1" in page


def test_implementations_for_gpus_are_read_from_the_rooms(tmp_path):
    libraries = (f"attend/libraries/{name}.py" for name in ("__init__", "cpu_flash", "cudnn"))
    rooms = ("scale/cuda_impl.py", "scale/cpu_impl.py", "add/triton_impl.py", "add/library_impl.py")
    for name in (*rooms, "attend/library_impl.py", *libraries):
        (tmp_path / "kernels" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kernels" / name).touch()
    assert gpu_implementations(tmp_path) == {
        "add": ["triton_impl", "library_impl"],
        "attend": ["library_impl.cudnn"],
        "scale": ["cuda_impl"],
    }


def test_the_page_is_up_to_date():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    expected = render(committed_results(), gpu_implementations())
    assert (ROOT / PAGE).read_text() == expected, "run: python -m benchmarks --summary"
