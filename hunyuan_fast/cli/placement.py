"""Where and in which data type a model runs."""

import re
from typing import TYPE_CHECKING

from hunyuan_fast.cli.errors import UsageError

if TYPE_CHECKING:
    import torch


# Option names of what the pipelines call otherwise.
_FLAGS = {
    "num_inference_steps": "--steps",
    "negative_prompt": "--negative",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "num_frames": "--frames",
    "num_videos": "--num-videos",
    "attention_precision": "--attention-precision",
}
_PLAIN = ("height", "width", "shift", "seed", "dtype", "device")


def read_place(device: str | None, dtype: str | None) -> "tuple[torch.device, torch.dtype | None]":
    """Device (a GPU if there is one, by default) and data type, checked.

    Raises:
        UsageError: a device that is not there or an unknown data type.
    """
    import torch

    from hunyuan_fast.pipelines.inputs import read_device, read_dtype

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return read_device(device), read_dtype(dtype)
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from error


def in_flags(message: str) -> str:
    """An error of the pipelines in the words of the command line."""
    head, must, rest = message.partition(" must ")
    for name in _PLAIN if must else ():
        head = re.sub(rf"\b{name}\b", f"--{name}", head)
    if must:
        head = re.sub(r"^prompt\b", "PROMPT", head)
    message = head + must + rest
    for name, flag in _FLAGS.items():
        message = re.sub(rf"\b{name}\b", flag, message)
    return message
