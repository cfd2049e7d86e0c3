"""Send a clip of your own through the VAE, frame quality in numbers.

python examples/reconstruct.py clip.mp4
"""

import sys

import torch

from hunyuan_fast.data.geometry import apply_fit, fit, whole_frames
from hunyuan_fast.data.metrics import psnr, ssim
from hunyuan_fast.data.video import read_video
from hunyuan_fast.models import HunyuanVideoVAE

frames, _ = read_video(sys.argv[1], max_frames=17)
frames = frames[: whole_frames(len(frames))]
frames = apply_fit(frames, fit(*frames.shape[1:3], to_height=96, to_width=96, multiple=8))

vae = HunyuanVideoVAE.from_pretrained("nano")
with torch.no_grad():
    video = frames.permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = vae.encode(video).mode()
    decoded = vae.decode(latents)[0].permute(1, 2, 3, 0)
result = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

print(f"{tuple(frames.shape)} -> latents {tuple(latents.shape)}")
print(f"PSNR {psnr(result, frames):.2f} dB, SSIM {ssim(result, frames):.4f}")
