"""The diffusion transformer: noisy latents, a time and a prompt in, a velocity out."""
