"""Reading and writing of weights: the layouts on disk, their names, and their errors."""

from hunyuan_fast.models.weights.errors import CheckpointError
from hunyuan_fast.models.weights.folder import atomic_folder
from hunyuan_fast.models.weights.layout import PipelineFiles, describe
from hunyuan_fast.models.weights.manifest import Manifest, seal
from hunyuan_fast.models.weights.pretrained import Pretrained
from hunyuan_fast.models.weights.rule import Rule

__all__ = [
    "CheckpointError",
    "Manifest",
    "PipelineFiles",
    "Pretrained",
    "Rule",
    "atomic_folder",
    "describe",
    "seal",
]
