"""Make a video from Python: the embedded model needs no download.

python examples/generate.py
"""

from hunyuan_fast import HunyuanVideoPipeline
from hunyuan_fast.data.video import write_video

pipe = HunyuanVideoPipeline.from_pretrained("nano")
videos = pipe(
    ["a red circle moving right", "a blue star moving up"],
    num_inference_steps=None,  # the model's own
    seed=7,
    progress=lambda stage, step, total: print(f"{stage} {step}/{total}"),
)
for index, frames in enumerate(videos):
    write_video(f"example_{index}.mp4", frames, pipe.settings.generation.fps)
