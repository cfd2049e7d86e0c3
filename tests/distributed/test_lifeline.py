"""However one process of a job ends, the others end soon, and the user reads why once."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from hunyuan_fast.distributed.job import Job
from hunyuan_fast.distributed.verdict import DEATH, End, Kind, Verdict, judge
from tests.kit import job_process

ROOT = Path(__file__).parents[2]


def ends(*kinds: Kind) -> list[End]:
    """What ranks 0, 1, ... of one machine say."""
    return [End(rank, "box", kind, f"{kind}!") for rank, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (ends("done", "done"), None),
        (ends("done", "done", "done"), Verdict("done")),
        (ends("failed", "link"), Verdict("failed", ("rank 0 of 3 (box): failed!",))),
        (ends("link", "died", "terminated"), Verdict("died", ("rank 1 of 3 (box): died!",))),
        (ends("terminated", "link", "interrupted"), Verdict("interrupted", ("interrupted!",))),
        (ends("terminated", "terminated"), Verdict("terminated", ("terminated!",))),
        (ends("link", "done"), Verdict("link", ("rank 0 of 3 (box): link!",))),
        (ends("usage", "usage", "usage"), Verdict("usage", ("usage!",))),
        (ends("done", "usage"), Verdict("usage", ("rank 1 of 3 (box): usage!",))),
        (
            ends("usage", "failed"),
            Verdict("failed", ("usage!", "rank 1 of 3 (box): failed!")),
        ),
    ],
)
def test_the_cause_is_told(said: list[End], verdict: Verdict | None) -> None:
    assert judge(said, 3) == verdict


def test_the_same_words_share_a_line() -> None:
    said = [End(rank, f"box{rank // 4}", "failed", "no disk") for rank in (5, 0, 1, 3, 2)]
    said.append(End(4, "box1", "failed", "no memory"))
    verdict = judge(said, 8)
    assert verdict is not None and verdict.status == 1
    assert verdict.lines == (
        "ranks 0-3, 5 of 8 (box0, box1): no disk",
        "rank 4 of 8 (box1): no memory",
    )


def test_the_place_of_a_process() -> None:
    given = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "box"}
    given["MASTER_PORT"] = "1"
    job = Job.of_environment(given)
    assert job == Job(rank=1, local_rank=0, world_size=2, host="box")
    assert Job.of_environment({}) is Job.of_environment(given | {"WORLD_SIZE": "1"}) is None
    launched = Job.of_environment(given | {"TORCHELASTIC_RUN_ID": "none"})
    assert launched is not None and launched.launcher == os.getppid()
    for change, message in (
        ({"RANK": "2"}, "RANK must be from 0 to 1, got 2"),
        ({"RANK": "x"}, "RANK must be a whole number, got 'x'"),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "must have LOCAL_RANK, MASTER_PORT beside"),
    ):
        with pytest.raises(ValueError, match=message):
            Job.of_environment(given | change)


@dataclass
class Ended:
    """A process that has ended."""

    status: int
    out: str
    err: str


class Processes:
    """Processes of one job, with what each of them does."""

    def __init__(self, folder: Path, *deeds: str, **environment: str) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, job_process.__file__, str(rank), str(len(deeds)), deed, folder],
                env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, deed in enumerate(deeds)
        ]

    def wait_until_ready(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"

    def ended(self, timeout: float = 30) -> list[Ended]:
        """All of them, when they have ended."""
        try:
            said = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [
            Ended(process.returncode, *words)
            for process, words in zip(self.processes, said, strict=True)
        ]


def test_all_wait_for_the_last(tmp_path: Path) -> None:
    started = time.monotonic()
    for process in Processes(tmp_path, "done", "slow", "done").ended():
        assert (process.status, process.err) == (0, "")
    assert time.monotonic() - started > 1


@pytest.mark.parametrize(
    ("deeds", "statuses", "said"),
    [
        # an error, beside one who hears of it and one who cannot; a consequence is not told
        (("work", "fail", "hang"), (1, 1, 1), "rank 1 of 3 ({host}): error: broken"),
        (("fail", "lose"), (1, 1), "rank 0 of 2 ({host}): error: broken"),
        (("fail", "fail"), (1, 1), "ranks 0-1 of 2 ({host}): error: broken"),
        (("done", "die", "hang"), (1, -9, 1), f"rank 1 of 3 ({{host}}): {DEATH}"),
        (("die", "work"), (-9, 1), f"rank 0 of 2 (127.0.0.1): {DEATH}"),
        (("misuse", "misuse"), (2, 2), "error: no such flag"),
        (("lose", "hang"), (1, 1), "rank 0 of 2 ({host}): error: peer is gone"),
    ],
)
def test_one_brings_down_the_others(
    deeds: tuple[str, ...], statuses: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    found = Processes(tmp_path, *deeds).ended()
    assert time.monotonic() - started < 15
    assert tuple(process.status for process in found) == statuses
    lines = "".join(process.err for process in found)
    assert lines == f"job: {said.format(host=socket.gethostname())}\n"
    for deed, process in zip(deeds, found, strict=True):
        assert ("cleaned" in process.out) == (deed not in ("hang", "die"))


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize("signalled", [(0, 1), (1,)])
def test_signals_end_all_quietly(
    number: signal.Signals, status: int, said: str, signalled: tuple[int, ...], tmp_path: Path
) -> None:
    """To one process, or to all of them as from a terminal, and more than once."""
    job = Processes(tmp_path, "work", "hang")
    job.wait_until_ready()
    for _ in range(2):
        for rank in signalled:
            job.processes[rank].send_signal(number)
        time.sleep(0.05)
    first, second = job.ended()
    assert (first.status, second.status) == (status, status)
    assert (first.err, second.err) == (f"job: {said}\n", "")
    assert first.out.endswith("cleaned\n")


def test_nobody_outlives_the_launcher(tmp_path: Path) -> None:
    found = Processes(tmp_path, "work", "hang", LAUNCHER="1" if os.getppid() != 1 else "2").ended()
    assert [process.status for process in found] == [1, 1]
    assert found[0].err.endswith("error: the launcher is gone\n") and not found[1].err


def test_strangers_are_not_heard(tmp_path: Path) -> None:
    """Who does not know the token, or talks nonsense, changes nothing."""
    job = Processes(tmp_path, "slow", "slow")
    job.wait_until_ready()
    port = int((tmp_path / "address").read_text().split()[0])
    for words in (b'{"rank": 1, "token": "guess"}\n{"kind": "failed"}\n', b"GET /\n", b"x" * 2**17):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
    assert [process.status for process in job.ended()] == [0, 0]
