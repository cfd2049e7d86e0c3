"""The published latencies of HunyuanVideo on one to eight GPUs, and what is predicted for them.

Source: the official repository's table of latencies with xDiT: 720 x 1280, 129 frames, 50 steps.
It does not name the GPU; xDiT's own page has the same figures under H100, and one H100 is also what
users report for 34 s a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hunyuan_fast.planning.hardware import GPUS, Hardware
from hunyuan_fast.planning.layouts import Layout
from hunyuan_fast.planning.timing import Clock, Practice
from hunyuan_fast.planning.work import Job, released

# GPUs (all of them Ulysses) and seconds.
OFFICIAL = ((1, 1904.0), (2, 934.0), (4, 514.0), (8, 338.0))
# What that program did, from figures published elsewhere, none of them from the table.
# FlashAttention-2, forward, heads of 128, 16k tokens on an H100: 370 TFLOP/s (its own charts).
FLASH2_TFLOPS = 370.0
# Reads and writes of its unfused blocks: about 120 vectors for each token of a double block, where
# `work` counts 23.
EAGER_PASSES = 120 / 23
# Decoding in tiles of 256 pixels and 64 frames that overlap by a quarter, on every GPU alone:
# 4214 TFLOP, where the clip as a whole takes 2011.
TILED_DECODE_FLOPS = 4214e12
# sglang on an H100, 848 x 480 x 65: 14.55 s for 1062 TFLOP of tiles.
DECODE_TFLOPS = 1062 / 14.55


@dataclass(frozen=True)
class Row:
    """Seconds of one row of the table: published, and predicted without and with a fit."""

    gpus: int
    published: float
    predicted: float
    fitted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was published."""
        return self.predicted / self.published - 1

    @property
    def fitted_error(self) -> float:
        """The same after the fit."""
        return self.fitted / self.published - 1


PRACTICE = Practice(
    whole_text=True,
    passes=EAGER_PASSES,
    shared_decode=False,
    decode_flops=TILED_DECODE_FLOPS,
)


def official_hardware(attention_tflops: float = FLASH2_TFLOPS) -> Hardware:
    """An H100 with the kernels of late 2024."""
    h100 = GPUS["h100"]
    attention, conv = attention_tflops / h100.tflops, DECODE_TFLOPS / h100.tflops
    return replace(h100, attention=attention, conv=conv)


def official_job() -> Job:
    """What the table measures."""
    return released(720, 1280, 129, steps=50)


def fitted_attention_tflops() -> float:
    """The rate of attention with which the row of one GPU comes out as published.

    It is the only constant fitted to the table, and to this row alone.
    """
    job = official_job()
    clock = Clock(job, official_hardware(), PRACTICE)
    attention = clock.step(Layout()).attention * job.steps
    rest = clock.video(Layout()) - attention
    return FLASH2_TFLOPS * attention / (OFFICIAL[0][1] - rest)


def check_official() -> list[Row]:
    """All rows of the table."""
    job = official_job()
    plain = Clock(job, official_hardware(), PRACTICE)
    fitted = Clock(job, official_hardware(fitted_attention_tflops()), PRACTICE)
    return [
        Row(gpus, seconds, *(clock.video(Layout(ulysses=gpus)) for clock in (plain, fitted)))
        for gpus, seconds in OFFICIAL
    ]
