"""A file written tensor by tensor has the bytes of safetensors' own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hunyuan_fast.models.weights.streamed import TensorsFile

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_of_the_library(tmp_path: Path, generator: torch.Generator, seed: int) -> None:
    draw = random.Random(seed)
    names = ["z", "a.weight", "a.bias", "A", "b.10", "b.9", '\u00e9 "quoted"', "scalar", "none"]
    tensors = {}
    for name in names:
        shape = {"scalar": (), "none": (0, 3)}.get(name, (draw.randint(1, 5), draw.randint(1, 7)))
        dtype = draw.choice(DTYPES[:1] if seed == 0 else DTYPES)
        tensors[name] = (10 * torch.rand(shape, generator=generator)).to(dtype)
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    forms = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    with TensorsFile(tmp_path / "ours", forms) as file:
        for name in draw.sample(names, len(names)):
            file.write(name, tensors[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


def test_a_tensor_that_never_comes(tmp_path: Path) -> None:
    forms = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    with (
        pytest.raises(AssertionError, match=r"file lacks \['b'\]"),
        TensorsFile(tmp_path / "file", forms) as file,
    ):
        file.write("a", torch.zeros(2))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk() -> None:
    forms = {"a": (torch.float32, (1 << 20,))}
    with (
        pytest.raises(OSError, match=r"full cannot be written: .*No space left"),
        TensorsFile(Path("/dev/full"), forms) as file,
    ):
        file.write("a", torch.zeros(1 << 20))
