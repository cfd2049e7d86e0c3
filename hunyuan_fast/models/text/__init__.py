"""Text encoders: a language model for token states and a CLIP text model for a pooled vector.

The networks are transformers' own classes, imported on first use.
"""

from hunyuan_fast.models.text.clip import CLIPTextEncoder
from hunyuan_fast.models.text.llm import LLMTextEncoder
from hunyuan_fast.models.text.template import PromptTemplate, installed_template

__all__ = ["CLIPTextEncoder", "LLMTextEncoder", "PromptTemplate", "installed_template"]
