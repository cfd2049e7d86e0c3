"""What ranks do in the tests of pipelines over several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_fast.distributed.broadcast import from_first, tensor_from_first, to_first
from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.distributed.traffic import count_traffic
from hunyuan_fast.models.dit.windows import AttentionWindows
from hunyuan_fast.pipelines import HunyuanVideoPipeline
from tests.kit.pipeline import tiny_pipeline

REQUEST = {"prompt": ["a red circle", "a blue star moving up"], "seed": 3}
REQUEST |= {"height": 48, "width": 32, "num_frames": 5, "num_inference_steps": 2}


def pipeline_with(attention: str) -> HunyuanVideoPipeline:
    """A pipeline whose transformer attends "dense", with "windows", or over "fp8" codes."""
    pipeline = tiny_pipeline()
    transformer = pipeline.transformer
    if attention == "fp8":
        transformer.set_attention(precision="fp8")
    elif attention == "windows":
        blocks = dict.fromkeys(transformer.attention_blocks(), ((1, 2, 1), (2, 1, 1)))
        windows = AttentionWindows(model="tiny", grid=(2, 3, 2), tile=(1, 1, 1), blocks=blocks)
        transformer.set_attention(windows=windows)
    return pipeline


def alone(attention: str = "dense", **changes: Any) -> Tensor:
    """What one process makes."""
    return pipeline_with(attention)(**REQUEST | changes)


def together(
    layout: dict[str, Any], changes: list[dict[str, Any]], attention: str = "dense"
) -> dict[str, Any]:
    """What this rank gets, knows and sees of a call with its own changes of the request."""
    pipeline = pipeline_with(attention).parallelize(Layout(**layout))
    seen: dict[str, Any] = {"calls": []}

    def look(module: Any, inputs: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
        seen["calls"].append({"latents": inputs[0], "timestep": inputs[1], **given})

    pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    rank = dist.get_rank()
    made = pipeline(**REQUEST | changes[rank % len(changes)])
    seen["made"] = made
    seen["text on"] = pipeline.text_encoder.device.type
    return seen


def stored(layout: dict[str, Any], folders: list[str], weights: list[bool]) -> dict[str, Any]:
    """What this rank makes of the pipeline in its own folder; weights: of the text encoders."""
    rank, how = dist.get_rank(), Layout(**layout)
    options: dict[str, Any] = {"dtype": torch.float32, "text_weights": weights[rank]}
    pipeline = HunyuanVideoPipeline.from_pretrained(folders[rank], **options).parallelize(how)
    kinds = {e.device.type for e in (pipeline.text_encoder, pipeline.text_encoder_2)}
    found = {"text on": kinds, "encodes": how.encodes(rank)}
    found["first"] = pipeline.ranks.is_first_of_video
    try:
        return found | {"made": pipeline.to("cpu")(**REQUEST, output_type="latent")}
    except (ValueError, RuntimeError) as error:
        return found | {"error": f"{type(error).__name__}: {error}"}


def refused(layout: dict[str, Any], changes: dict[str, Any]) -> str:
    """What this rank hears of a call that rank 0 refuses."""
    pipeline = tiny_pipeline().parallelize(Layout(**layout))
    try:
        pipeline(**REQUEST | (changes if dist.get_rank() == 0 else {}))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def not_fitting(layout: dict[str, Any]) -> str:
    try:
        tiny_pipeline().parallelize(Layout(**layout))
    except ValueError as error:
        return str(error)
    return "no error"


def exchanged() -> dict[str, Any]:
    """The helpers of a group by themselves."""
    rank, everybody = dist.get_rank(), dist.group.WORLD
    with count_traffic() as traffic:
        same = tensor_from_first(
            torch.arange(6).to(torch.bfloat16).view(2, 3).T if rank == 0 else None,
            everybody,
            torch.device("cpu"),
        )
        none = tensor_from_first(
            torch.empty(0, 2) if rank == 0 else None, everybody, torch.device("cpu")
        )
        whole = to_first(torch.full((rank, 2), float(rank)), (0, 1, 2), everybody)
    return {
        "object": from_first(lambda: {"of": rank}, everybody),
        "same": same,
        "none": none,
        "whole": whole,
        "bytes": dict(traffic.bytes),
    }
