"""The place of this process in its job, as ``torchrun`` tells it to every process it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which process this is.

    rank: of world_size
    local_rank: of those on this machine
    host: where rank 0 runs
    launcher: process that must outlive this one, if any
    """

    rank: int
    local_rank: int
    world_size: int
    host: str
    launcher: int | None = None

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Job | None:
        """What the environment says, ``None`` where there is one process alone.

        Raises ValueError for a variable that is missing, or no number, or out of range.
        """
        if environment.get("WORLD_SIZE", "1") == "1":
            return None
        missing = [name for name in REQUIRED if not environment.get(name)]
        if missing:
            raise ValueError(
                f"the environment must have {', '.join(missing)} beside WORLD_SIZE; start the "
                "processes with torchrun, which sets them"
            )
        rank, local_rank, world_size = (_number(environment, name) for name in REQUIRED[:3])
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK must be from 0 to {world_size - 1}, got {rank}")
        launched = "TORCHELASTIC_RUN_ID" in environment
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            host=environment["MASTER_ADDR"],
            launcher=os.getppid() if launched else None,
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {environment[name]!r}") from None
