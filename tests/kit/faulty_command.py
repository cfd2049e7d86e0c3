"""The command line with a fault in one rank: ``torchrun ... faulty_command.py generate ...``.

FAULT: "RANK raise" or "RANK kill", in the middle of denoising; the file ``fault`` has the time.
LATENTS: a file for what rank 0 decodes.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hunyuan_fast.cli import main
from hunyuan_fast.pipelines import text_to_video

unchanged = text_to_video.integrate
rank, _, deed = os.environ.get("FAULT", "none none").partition(" ")


def integrate(velocity: Any, x: Any, sigmas: Any, on_step: Any) -> Any:
    def then(step: int, *given: Any) -> None:
        on_step(step, *given)
        if os.environ["RANK"] == rank:
            Path("fault").touch()
            if deed == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("planted")

    latents = unchanged(velocity, x, sigmas, then)
    if "LATENTS" in os.environ and os.environ["RANK"] == "0":
        torch.save(latents, os.environ["LATENTS"])
    return latents


if __name__ == "__main__":
    text_to_video.integrate = integrate
    sys.exit(main())
