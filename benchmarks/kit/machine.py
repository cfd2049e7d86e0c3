"""What is measured on, from which code, and how busy the machine is with other things."""

import os
import platform
import re
import resource
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.kit.discover import ROOT, WHOLES

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
# A neighbour that takes more of the machine than this shows in the figures.
SHARED_ABOVE = 0.1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and software of a run. arch: as dispatch names it, ``cpu`` or ``sm_90``."""

    device: str
    arch: str
    driver: str | None
    cpu: str
    cpu_capability: str
    threads: int
    cores: int
    torch: str
    cuda: str | None
    triton: str | None
    python: str
    system: str

    @property
    def slug(self) -> str:
        """The name of the device's folder of results."""
        words = self.device if self.arch != "cpu" else f"cpu {self.device} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The code that was measured. clean: the op and the kit are as in the commit."""

    commit: str | None
    clean: bool
    date: str
    command: str


def describe_machine(device: torch.device) -> Machine:
    """The machine at hand, seen as a place to run on ``device``."""
    cpu = _cpu_model()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"sm_{major}{minor}"
    else:
        name, arch = cpu, "cpu"
    return Machine(
        device=name,
        arch=arch,
        driver=_driver() if device.type == "cuda" else None,
        cpu=cpu,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _all_cores(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=_version("triton"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
    )


def describe_source(op: str, command: str) -> Source:
    """The commit at hand, and whether what ``op`` is made of differs from it.

    Raises ValueError when a tree without git is said to be of something that is no commit.
    """
    commit = _git("rev-parse", "HEAD")
    claimed = os.environ.get("HUNYUAN_FAST_COMMIT")
    if commit is None and claimed:
        if not re.fullmatch("[0-9a-f]{40}", claimed):
            raise ValueError(f"HUNYUAN_FAST_COMMIT must be 40 hexadecimal digits, got {claimed!r}")
        return Source(commit=claimed, clean=True, date=_now(), command=command)
    parts = [f"kernels/{op}", f"csrc/{op}", "csrc/common", f"hunyuan_fast/ops/{op}.py"]
    if op in WHOLES:
        parts = ["kernels", "csrc", "hunyuan_fast"]
    shared = ("hunyuan_fast/dispatch.py", "benchmarks", ":!benchmarks/results")
    changes = _git("status", "--porcelain", "--", *parts, *shared)
    return Source(
        commit=commit,
        clean=commit is not None and changes == "",
        date=_now(),
        command=command,
    )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def cache_bytes() -> int:
    """The size of the CPU's last-level cache; 32 MiB when the system does not say."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((parse_size(size) for size in sizes), default=32 * 2**20)


def parse_size(text: str) -> int:
    """Bytes of a size as Linux writes it: 32768K, 64M."""
    unit = _UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


class Neighbours:
    """How much of the machine others use between construction and :meth:`share`."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        """Part of all cores, 0 to 1, that was busy with other processes; None when not known."""
        busy = _busy_seconds()
        wall = time.monotonic() - self._wall
        if busy is None or self._busy is None or wall <= 0:
            return None
        others = (busy - self._busy) - (_own_seconds() - self._own)
        return min(1.0, max(0.0, others / (wall * _all_cores())))


def is_shared(share: float | None) -> bool:
    """Whether neighbours took enough of the machine to be seen in the figures."""
    return share is not None and share > SHARED_ABOVE


def _all_cores() -> int:
    return os.cpu_count() or 1


def _busy_seconds() -> float | None:
    """Processor seconds that the whole system has worked, or a hypervisor has taken away."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(each) for each in who]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    return _output(["git", "-C", str(ROOT), *args])


def _output(command: list[str]) -> str | None:
    """The standard output of a program, its first line if many; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else None
