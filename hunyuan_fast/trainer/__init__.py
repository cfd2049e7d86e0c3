"""Training: objectives, the loop, checkpoints with exact resume, recipes."""
