"""What every test shares: where Triton runs, how many threads, which seed, what memory holds."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton decides at decoration whether a kernel is interpreted: this precedes every kernel's import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Whoever runs the tests may have measured a ranking; they are about the one that is committed.
os.environ["HUNYUAN_FAST_CACHE"] = os.devnull

from tests.kit.memory import poisoned_memory
from tests.kit.turns import turn_on_the_gpu

__all__ = ["turn_on_the_gpu"]  # a fixture

OPS = Path(__file__).parent / "ops"

# two threads, unless so many processes that test share the cores
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(min(2, max(1, torch.get_num_threads() // WORKERS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes for ``-n auto``: each takes a gigabyte or two, and compiles for a GPU on a core."""
    cores = os.cpu_count() or 1
    return min(8, max(1, cores // 2) if torch.cuda.is_available() else cores)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--resources", action="store_true", help="print what kernels compiled ahead of time use"
    )
    parser.addoption(
        "--rehearse-gpu",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="run the tests that need a GPU, and only those, N cases of each, on a pretended one; "
        "verifies nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (cases := config.getoption("--rehearse-gpu")) is not None:
        from tests.kit import rehearsal

        rehearsal.begin()
        config.pluginmanager.register(rehearsal.Plugin(cases))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--resources"):
        from tests.kit.aot import resources_table

        terminalreporter.section("kernels compiled ahead of time")
        for line in resources_table():
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The global generators start from a number of the test's own, the same in every run."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A generator of the test's own, for inputs that do not depend on what ran before."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, for the length of the test."""
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter rounds as a GPU does and checks every address (nothing without it)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from tests.kit.interpreter import install
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return
    install()


@pytest.fixture(autouse=True)
def _ops_are_watched(request: pytest.FixtureRequest) -> None:
    """Tests of ops always run on poisoned memory and on the repaired, guarded interpreter."""
    if OPS in request.path.parents:
        request.getfixturevalue("poison")
        request.getfixturevalue("interpreter")
