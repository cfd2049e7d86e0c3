"""The recipe of the embedded miniature: every part trained from nothing on rendered clips."""

from hunyuan_fast.trainer.nano.recipe import NanoRecipe
from hunyuan_fast.trainer.nano.train import train

__all__ = ["NanoRecipe", "train"]
