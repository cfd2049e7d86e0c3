"""Nano by several processes against nano by one: ``torchrun ... -m benchmarks.nano_ranks --cp 2``.

Every process makes the clips alone first, then all make them together; the differences are those of
what rank 0 has.
"""

import argparse

import torch
import torch.distributed as dist

from hunyuan_fast.distributed.mesh import Layout
from hunyuan_fast.pipelines import HunyuanVideoPipeline

PROMPTS = ["a red circle moving right", "a blue star moving up"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("dp", "cp", "ulysses", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    words = vars(parser.parse_args())
    asked = {"prompt": PROMPTS, "num_inference_steps": words.pop("steps")}
    layout = Layout(**words)
    pipe = HunyuanVideoPipeline.from_pretrained("nano")
    kinds = ("latent", "float")
    alone = {kind: pipe(**asked, output_type=kind) for kind in kinds}
    dist.init_process_group("gloo")
    pipe.parallelize(layout)
    together = {kind: pipe(**asked, output_type=kind) for kind in kinds}
    if dist.get_rank() == 0:
        far = {kind: _difference(together[kind], alone[kind]) for kind in kinds}
        shape = " x ".join(map(str, alone["float"].shape[1:4]))
        print(f"{len(PROMPTS)} clips of {shape}: latents {far['latent']:.1e}, ", end="")
        print(f"pixels in [0, 1] {far['float']:.1e}")
    dist.destroy_process_group()


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


if __name__ == "__main__":
    main()
