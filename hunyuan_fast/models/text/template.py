"""The chat skeleton that a prompt is put into before the language model reads it."""

from dataclasses import dataclass

PLACEHOLDER = "{}"
OFFICIAL_MAX_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Text around the prompt, and which tokens of the result condition the model.

    template: text with one {} where the prompt goes
    crop_start: number of tokens before the prompt, beginning-of-text included; they are dropped
    max_length: number of tokens kept after the crop; longer prompts are cut
    Raises TypeError or ValueError naming the field.
    """

    template: str
    crop_start: int
    max_length: int = OFFICIAL_MAX_LENGTH

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise TypeError(f"template must be a string, got {type(self.template).__name__}")
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError(
                f"template must hold the placeholder {PLACEHOLDER} exactly once, "
                f"got {self.template.count(PLACEHOLDER)} in {self.template!r}"
            )
        for field, least in (("crop_start", 0), ("max_length", 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field} must be an integer, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{field} must be at least {least}, got {value}")

    def fill(self, prompt: str) -> str:
        """Return the template with the prompt in place, white space around the prompt removed.

        A leading newline would merge with the template's last token and move the crop.
        """
        before, after = self.template.split(PLACEHOLDER)
        return before + prompt.strip() + after


def installed_template() -> PromptTemplate:
    """Return the video template of the released model, read from the installed diffusers.

    Raises ImportError saying what to install, or which file to write, without diffusers.
    """
    try:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    except ImportError as error:
        raise ImportError(
            "the prompt template of the released model is read from diffusers, which cannot be "
            f"imported ({error}); install it with `pip install diffusers`, or put a file "
            "prompt_template.json with the fields template, crop_start and max_length into the "
            "checkpoint folder"
        ) from error
    return PromptTemplate(
        template=DEFAULT_PROMPT_TEMPLATE["template"],
        crop_start=DEFAULT_PROMPT_TEMPLATE["crop_start"],
    )
