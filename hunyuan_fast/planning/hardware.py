"""What GPUs can do: peaks of data sheets, shares of them that are reached, and links."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

_SHARES = {"gemm", "attention", "attention_backward", "conv"} | {
    f"{name}_share" for name in ("memory", "link", "network")
}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU in nodes of `node` of them; every number can stand in a hardware file.

    tflops: dense peak of the data type, TFLOP/s; memory_gib: as the driver reports it
    bandwidth_gbs: of the memory, GB/s; host_gbs: from host memory, one direction
    link_gbs, link_us: to a GPU of the same node, one direction; seconds of a message / 10^-6
    network_gbs, network_us: to another node, the share of one GPU
    gemm, attention, attention_backward, conv: shares of `tflops` that kernels reach
    memory_share, link_share, network_share: shares of the bandwidths that kernels reach
    kernel_us: from one kernel to the next when neither has much to do
    tile: rows that a matrix product computes at least
    """

    name: str
    tflops: float
    memory_gib: float
    bandwidth_gbs: float
    node: int = 8
    host_gbs: float = 25.0
    link_gbs: float
    link_us: float = 5.0
    network_gbs: float
    network_us: float = 15.0
    gemm: float = 0.75
    attention: float = 0.65
    attention_backward: float = 0.55
    conv: float = 0.3
    memory_share: float = 0.85
    link_share: float = 0.8
    network_share: float = 0.8
    kernel_us: float = 4.0
    tile: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                if not isinstance(value, str) or not value:
                    raise TypeError(f"name must be a text, got {value!r}")
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            least = 0 if field.name.endswith("_us") else 1e-9
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name} must be positive, got {value}")
            if field.name in _SHARES and value > 1:
                raise ValueError(f"{field.name} must be at most 1, got {value}")
            if field.name in ("node", "tile") and value != int(value):
                raise ValueError(f"{field.name} must be a whole number, got {value}")

    @property
    def gemm_rate(self) -> float:
        """FLOP/s of large matrix products."""
        return self.tflops * self.gemm * 1e12

    def attention_rate(self, *, backward: bool = False) -> float:
        """FLOP/s of attention over long sequences."""
        return self.tflops * (self.attention_backward if backward else self.attention) * 1e12

    @property
    def conv_rate(self) -> float:
        """FLOP/s of the autoencoder's convolutions, norms and all."""
        return self.tflops * self.conv * 1e12

    @property
    def memory_rate(self) -> float:
        """Bytes/s that a kernel reads and writes."""
        return self.bandwidth_gbs * self.memory_share * 1e9

    @property
    def link_rate(self) -> float:
        """Bytes/s that a GPU sends within its node."""
        return self.link_gbs * self.link_share * 1e9

    @property
    def network_rate(self) -> float:
        """Bytes/s that a GPU sends to other nodes."""
        return self.network_gbs * self.network_share * 1e9

    @property
    def usable(self) -> float:
        """Bytes for tensors: what the driver reports, less its context, the buffers of the
        collectives (1.5 GiB together) and a twentieth that fragmentation may cost."""
        return (self.memory_gib - min(1.5, 0.1 * self.memory_gib)) * 0.95 * 2**30


# Peaks: NVIDIA's data sheets, dense, bf16 with fp32 accumulation; NVLink's total halved to one
# direction. memory_gib: what nvidia-smi reports. Network: what the maker's own reference systems
# have, shared out over the GPUs of a node (DGX A100: 8 x 200 Gb/s; DGX H100, H200, B200 and HGX
# H20: 8 x 400 Gb/s), for PCIe cards an assumption that is named. Shares say where they are from;
# "assumed" ones nobody has measured for these shapes. Latencies are assumed throughout.
_HOPPER = Hardware(
    name="H100 SXM 80 GB",
    tflops=989.4,
    memory_gib=79.6,
    bandwidth_gbs=3350,
    host_gbs=50,  # PCIe 5 x16, 64 GB/s less protocol
    link_gbs=450,
    network_gbs=50,
    gemm=0.80,  # 790 TFLOP/s, measured on an H200
    attention=0.70,  # cuDNN 9.19 on an H200, heads of 128, 16k to 32k tokens: 693 to 702 TFLOP/s
    attention_backward=0.60,  # the same, 572 to 612 TFLOP/s
    conv=0.30,  # assumed: nobody publishes a rate of bf16 convolutions in three dimensions
    memory_share=0.85,  # QuACK's RMSNorm on an H100: 82 to 89 %
    link_share=0.80,  # bus bandwidth of NCCL's gathers on eight H100: about 360 GB/s
)
GPUS: dict[str, Hardware] = {
    "a100-40": Hardware(
        name="A100 SXM 40 GB",
        tflops=312,
        memory_gib=39.6,
        bandwidth_gbs=1555,
        host_gbs=25,  # PCIe 4 x16
        link_gbs=300,
        network_gbs=25,
        gemm=0.80,  # assumed, as on Hopper
        attention=0.70,  # FlashAttention-2's paper: up to 73 % on an A100
        attention_backward=0.60,  # the same: up to 63 %
        conv=0.30,  # assumed
    ),
    "h100": _HOPPER,
    "h200": replace(_HOPPER, name="H200 SXM 141 GB", memory_gib=140.4, bandwidth_gbs=4800),
    "h20": replace(
        _HOPPER,
        name="H20 96 GB",
        tflops=148,
        memory_gib=95.6,
        bandwidth_gbs=4000,
        gemm=0.90,  # assumed: few tensor cores, easily fed
        attention=0.80,  # assumed
        attention_backward=0.70,  # assumed
    ),
    "b200": replace(
        _HOPPER,
        name="B200 SXM 180 GB",
        tflops=2250,
        memory_gib=179.0,
        bandwidth_gbs=7700,
        link_gbs=900,
        gemm=0.75,  # assumed
        attention=0.71,  # FlashAttention-4: 1605 TFLOP/s
        attention_backward=0.60,  # the same: 1360 TFLOP/s
        conv=0.25,  # assumed
        link_share=0.75,  # assumed
    ),
    "l40s": Hardware(
        name="L40S 48 GB",
        tflops=362,
        memory_gib=45.0,
        bandwidth_gbs=864,
        host_gbs=25,
        link_gbs=32,  # PCIe 4 x16: there is no NVLink
        link_us=10,
        network_gbs=12.5,  # assumed: one port of 200 Gb/s for two GPUs
        gemm=0.65,  # assumed: 350 W do not hold the clock of the data sheet
        attention=0.50,  # assumed, for the same reason
        attention_backward=0.40,  # assumed
        conv=0.25,  # assumed
        link_share=0.7,  # assumed
    ),
    "4090": Hardware(
        name="GeForce RTX 4090 24 GB",
        tflops=165.2,
        memory_gib=24.0,
        bandwidth_gbs=1008,
        host_gbs=25,
        link_gbs=32,  # PCIe 4 x16, and through host memory: the driver allows no peer access
        link_us=20,
        network_gbs=1.6,  # assumed: one port of 100 Gb/s for eight GPUs
        gemm=0.90,  # assumed
        attention=0.85,  # assumed
        attention_backward=0.70,  # assumed
        conv=0.40,  # assumed
        link_share=0.4,  # assumed: twice over the bus
    ),
}
GPUS["a100-80"] = replace(
    GPUS["a100-40"], name="A100 SXM 80 GB", memory_gib=79.3, bandwidth_gbs=2039
)


def find_gpu(name: str) -> Hardware:
    """The GPU of the table with this name; a ValueError tells the names there are."""
    if name.lower() not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(sorted(GPUS))}, got {name!r}")
    return GPUS[name.lower()]


def read_hardware(path: Path) -> Hardware:
    """The hardware of a TOML or JSON file: fields of `Hardware`, and `like`, a GPU to start from.

    Raises ValueError or TypeError that name the file and what is wrong in it; OSError.
    """
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text) if path.suffix == ".json" else _toml(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise TypeError(f"{path} must hold names and values, got {type(data).__name__}")
    try:
        return _build(data)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ValueError("TOML needs Python 3.11; write the same as JSON, into a .json")
    import tomllib

    return tomllib.loads(text)


def _build(data: dict[str, Any]) -> Hardware:
    given = dict(data)
    base = asdict(find_gpu(str(given.pop("like")))) if "like" in given else {}
    known = [field.name for field in fields(Hardware)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]} is not known; expected like, {', '.join(known)}")
    values = {**base, **given}
    needed = ("name", "tflops", "memory_gib", "bandwidth_gbs", "link_gbs", "network_gbs")
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{missing[0]} is missing; give it, or a GPU to start from as like")
    return Hardware(**values)


def hardware_text(hardware: Hardware, suffix: str = ".toml") -> str:
    """The text of a .toml or .json file that `read_hardware` reads back."""
    if suffix == ".json":
        return json.dumps(asdict(hardware), indent=2) + "\n"
    rows = []
    for name, value in asdict(hardware).items():
        text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
        rows.append(f"{name} = {text}\n")
    return "".join(rows)
