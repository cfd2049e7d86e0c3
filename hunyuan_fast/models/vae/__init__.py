"""The causal 3D VAE: a clip in, a few latent values out, and back."""
