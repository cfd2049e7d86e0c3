"""What this device reaches, as a hardware file for plans, and how far plans of it are from clocks.

The rates are measured on operations of their own, never on what is predicted afterwards.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_fast.models.dit.blocks import DoubleStreamBlock, SingleStreamBlock
from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.dit.model import HunyuanVideoTransformer
from hunyuan_fast.models.vae.model import HunyuanVideoVAE
from hunyuan_fast.modules.rotary import rotary_tables
from hunyuan_fast.ops.fused_modulation import layer_norm_modulate
from hunyuan_fast.ops.rope3d_attention import attention
from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.layouts import Layout
from hunyuan_fast.planning.timing import Clock, Seconds
from hunyuan_fast.planning.work import Job, Kind, released

Progress = Callable[[str, int, int], None]
_ROUNDS, _LEAST_SAMPLE = 3, 0.02
_WIDTH, _HEADS, _HEAD = 3072, 4, 128
_NANO_SIZES = ((96, 96, 17), (256, 256, 33))  # what it has learned, and ten times the tokens


@dataclass(frozen=True)
class Comparison:
    """Seconds of one piece of work: predicted from the rates of the hardware, and by the clock."""

    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to the clock."""
        return self.predicted / self.measured - 1


def probe(
    device: torch.device, dtype: torch.dtype, progress: Progress = lambda *_: None
) -> Hardware:
    """The rates that kernels reach here. Links are not measured: they stand for one GPU alone."""
    measures = (_gemm, _attention, _attention_backward, _conv, _bandwidth, _start)
    found = []
    for done, each in enumerate(measures):
        progress("rates", done, len(measures))
        found.append(each(device, dtype))
    progress("rates", len(measures), len(measures))
    *rates, bandwidth, start = found
    peak = max(rates)
    shares = [rate / peak for rate in rates]
    return Hardware(
        name=_name(device),
        tflops=peak / 1e12,
        memory_gib=_memory(device) / 2**30,
        bandwidth_gbs=bandwidth / 1e9,
        node=1,
        link_gbs=bandwidth / 1e9,
        network_gbs=bandwidth / 1e9,
        gemm=shares[0],
        attention=shares[1],
        attention_backward=shares[2],
        conv=shares[3],
        memory_share=1.0,
        kernel_us=start * 1e6,
        tile=128 if device.type == "cuda" else 1,
    )


def compare(
    hardware: Hardware,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> list[Comparison]:
    """Blocks of the released width, and the whole embedded transformer, forward and backward."""
    works = (_double, _single, _nano)
    found: list[Comparison] = []
    for done, each in enumerate(works):
        progress("compare", done, len(works))
        found += each(hardware, device, dtype)
    progress("compare", len(works), len(works))
    return found


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    once = _sample(run, 1, device)
    calls = max(1, round(_LEAST_SAMPLE / max(once, 1e-6)))
    return median(_sample(run, calls, device) for _ in range(_ROUNDS))


def _sample(run: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _gemm(device: torch.device, dtype: torch.dtype) -> float:
    rows = 512 if device.type == "cpu" else 8192
    x = torch.randn(rows, _WIDTH, device=device, dtype=dtype)
    weight = torch.randn(4 * _WIDTH, _WIDTH, device=device, dtype=dtype)
    return 2.0 * x.numel() * len(weight) / _seconds(lambda: F.linear(x, weight), device)


def _heads(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, float]:
    """Queries, keys and values, their lengths, and FLOPs of attention over them."""
    rows = 1024 if device.type == "cpu" else 16384
    qkv = [torch.randn(1, rows, _HEADS, _HEAD, device=device, dtype=dtype) for _ in range(3)]
    kv_len = torch.full((1,), rows, dtype=torch.int32, device=device)
    return qkv, kv_len, 4.0 * rows**2 * _HEADS * _HEAD


@torch.no_grad()
def _attention(device: torch.device, dtype: torch.dtype) -> float:
    qkv, kv_len, flops = _heads(device, dtype)
    return flops / _seconds(lambda: attention(*qkv, kv_len=kv_len), device)


def _attention_backward(device: torch.device, dtype: torch.dtype) -> float:
    qkv, kv_len, flops = _heads(device, dtype)
    out = attention(*(x.requires_grad_() for x in qkv), kv_len=kv_len)
    assert isinstance(out, Tensor)
    grad = torch.randn_like(out)
    backward = _seconds(
        lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True),
        device,
    )
    return 2.5 * flops / backward


@torch.no_grad()
def _conv(device: torch.device, dtype: torch.dtype) -> float:
    vae = HunyuanVideoVAE.from_pretrained("nano", device=device, dtype=dtype)
    job = Job(model="", config=TransformerConfig(), vae=vae.config, height=96, width=96, frames=17)
    latent = torch.randn(1, vae.config.latent_channels, *job.latent, device=device, dtype=dtype)
    return job.decode_flops / _seconds(lambda: vae.decode(latent), device)


@torch.no_grad()
def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    rows = 4096 if device.type == "cpu" else 65536
    x = torch.randn(1, rows, _WIDTH, device=device, dtype=dtype)
    shift = torch.randn(1, _WIDTH, device=device, dtype=dtype)
    moved = 2.0 * x.numel() * x.element_size()
    return moved / _seconds(lambda: layer_norm_modulate(x, shift, shift), device)


@torch.no_grad()
def _start(device: torch.device, dtype: torch.dtype) -> float:
    """Between a fused operation and a matrix product, of next to nothing."""
    x = torch.randn(1, 8, 32, device=device, dtype=dtype)
    shift, weight = torch.randn(1, 32).to(x), torch.randn(32, 32).to(x)
    fused = _seconds(lambda: layer_norm_modulate(x, shift, shift), device)
    return (fused + _seconds(lambda: F.linear(x, weight), device)) / 2


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _double(hardware: Hardware, device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    return _block(DoubleStreamBlock, "double", hardware, device, dtype)


def _single(hardware: Hardware, device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    return _block(SingleStreamBlock, "single", hardware, device, dtype)


def _block(
    made_by: Callable[[int, int, int], nn.Module],
    kind: Kind,
    hardware: Hardware,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Comparison]:
    size = (128, 128, 13) if device.type == "cpu" else (480, 848, 65)
    job = released(*size, text_tokens=64, training=True, weight_bytes=dtype.itemsize)
    config = job.config
    with torch.device("meta"):
        block = made_by(config.hidden_size, config.heads_num, config.mlp_width).to(dtype)
    block.to_empty(device=device)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.uniform_(-0.02, 0.02)
    predicted = Clock(job, hardware).blocks(Layout())[kind]
    run = _block_call(block, kind, job, device, dtype)
    return _both_ways(f"{kind} block, {job.tokens} tokens", predicted, run, block, device)


def _block_call(
    block: nn.Module, kind: Kind, job: Job, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    config = job.config
    grid = (job.latent[0], job.latent[1] // 2, job.latent[2] // 2)
    rotary = rotary_tables(grid, config.rope_dim_list, config.rope_theta, device)
    rows = [job.video_tokens, job.text_tokens] if kind == "double" else [job.tokens]
    random = partial(torch.randn, device=device, dtype=dtype)
    streams = [random(1, n, config.hidden_size).requires_grad_() for n in rows]
    vec = random(1, config.hidden_size)
    kv_len = torch.full((1,), job.tokens, dtype=torch.int32, device=device)

    def run() -> Tensor:
        out = block(*streams, vec, rotary, kv_len)
        return out if isinstance(out, Tensor) else torch.cat(out, dim=1)

    return run


def _nano(hardware: Hardware, device: torch.device, dtype: torch.dtype) -> list[Comparison]:
    model = HunyuanVideoTransformer.from_pretrained("nano", device=device, dtype=dtype)
    found = []
    for height, width, frames in _NANO_SIZES:
        job = Job(
            model="nano",
            config=model.config,
            height=height,
            width=width,
            frames=frames,
            text_tokens=64,
            training=True,
            weight_bytes=dtype.itemsize,
        )
        run = partial(model, **_nano_inputs(job, device, dtype))
        predicted = Clock(job, hardware).passes(Layout())
        found += _both_ways(f"nano, {job.tokens} tokens", predicted, run, model, device)
    return found


def _nano_inputs(job: Job, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    config, random = job.config, partial(torch.randn, device=device, dtype=dtype)
    return {
        "latents": random(1, config.in_channels, *job.latent),
        "timestep": torch.full((1,), 500.0, device=device),
        "text_states": random(1, job.text_tokens, config.text_states_dim),
        "text_mask": torch.ones(1, job.text_tokens, dtype=torch.bool, device=device),
        "pooled_text": random(1, config.text_states_dim_2),
        "guidance": torch.full((1,), 6000.0, device=device),
    }


def _both_ways(
    name: str,
    predicted: tuple[Seconds, Seconds],
    run: Callable[[], Tensor],
    module: nn.Module,
    device: torch.device,
) -> list[Comparison]:
    forward, backward = predicted
    with torch.no_grad():
        alone = _seconds(run, device)
        grad = torch.randn_like(run())

    def there_and_back() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        run().backward(grad)

    both = _seconds(there_and_back, device)
    for parameter in module.parameters():
        parameter.grad = None
    return [
        Comparison(f"{name}, forward", forward.total, alone),
        Comparison(f"{name}, forward and backward", (forward + backward).total, both),
    ]
