"""Several prompts side by side in one animated picture, as in the README.

python examples/gallery.py gallery.gif
"""

import sys

import torch
from PIL import Image

from hunyuan_fast import HunyuanVideoPipeline

PROMPTS = [
    "a red circle moving right",
    "a blue star moving up",
    "a yellow square moving left",
    "a green triangle moving down",
    "a white star standing still on a teal background",
    "a small purple circle moving down quickly",
    "a large green square moving right slowly",
    "a red triangle moving left and a blue circle moving right",
]

pipe = HunyuanVideoPipeline.from_pretrained("nano")
videos = pipe(PROMPTS, num_inference_steps=None, seed=1)  # (8, T, H, W, 3); None: the model's own
upper, lower = (torch.cat(list(row), dim=2) for row in videos.chunk(2))
frames = [Image.fromarray(frame.numpy()) for frame in torch.cat((upper, lower), dim=1)]
duration = 1000 // pipe.settings.generation.fps
frames[0].save(sys.argv[1], save_all=True, append_images=frames[1:], duration=duration, loop=0)
print(f"{sys.argv[1]}: {len(PROMPTS)} clips of {len(frames)} frames")
