"""Benchmarks on the pretended device, small, with results that are thrown away.

python -m tests.kit.rehearsal                   the cases that they have for a GPU, at small sizes
python -m tests.kit.rehearsal gelu_tanh         some of them; all options of python -m benchmarks
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated


def main(argv: list[str]) -> int:
    """Run the command of the benchmarks; returns its exit status."""
    from tests.kit.rehearsal.device import Device
    from tests.kit.rehearsal.plugin import begin

    begin()
    _small_shapes()
    from benchmarks import __main__ as command
    from benchmarks.kit import record

    with tempfile.TemporaryDirectory() as folder, Device():
        record.RESULTS = record.SCRATCH = Path(folder)
        return command.main(["--device", "cuda", "--skip-test", *argv])


def _small_shapes() -> None:
    """Every shape of the real models by a miniature of its own name."""
    from benchmarks import shapes
    from benchmarks.kit.pairing import Rounds
    from tests.kit.rehearsal.plugin import ROUNDS

    for name, value in vars(shapes).copy().items():
        if isinstance(value, shapes.Tokens):
            small = replace(value, grid=(2, 3, 4), text=min(value.text, 16))
        elif isinstance(value, shapes.Clip):
            small = replace(value, frames=5, height=16, width=24)
        elif isinstance(value, shapes.Maps):
            small = replace(value, shape=(1, 32, 2, 3, 4))
        else:
            continue
        setattr(shapes, name, small)
    shapes.HIDDEN_SIZE, shapes.NUM_HEADS = 256, 2

    from benchmarks import bench_causal_conv3d as conv3d
    from benchmarks import bench_vae as vae

    vae._REAL, vae._GPU_PROBE = vae._QUICK, vae._QUICK_PROBE
    conv3d.VAEConfig = lambda: vae._QUICK
    conv3d._GPU_TRAINED = tuple(
        replace(each, size=(2, 3, 4), channels=16, out_channels=16) for each in conv3d._GPU_TRAINED
    )
    for module in (vae, conv3d):
        rounds = {name: ROUNDS for name, value in vars(module).items() if isinstance(value, Rounds)}
        vars(module).update(rounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
