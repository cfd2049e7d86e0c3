"""Pipelines: a prompt in, a video out."""

from hunyuan_fast.pipelines.settings import GenerationDefaults, PipelineSettings
from hunyuan_fast.pipelines.text_to_video import HunyuanVideoPipeline

__all__ = ["GenerationDefaults", "HunyuanVideoPipeline", "PipelineSettings"]
