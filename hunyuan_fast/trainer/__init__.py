"""Training: objectives, the loop, checkpoints with exact resume, and the recipe of the embedded model."""
