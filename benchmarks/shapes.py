"""The shapes that the ops meet in the real models, by name."""

from dataclasses import dataclass

# Width, heads and features of a head of the 13B transformer.
HIDDEN_SIZE, NUM_HEADS, HEAD_DIM = 3072, 24, 128
ROPE_DIMS = (16, 56, 56)
ROPE_THETA = 256.0
# How much of the text a prompt fills, as most leave room.
FILLED = 5 / 8


@dataclass(frozen=True)
class Tokens:
    """The token sequence of one clip: video tokens on a grid (T, H, W), then text tokens."""

    name: str
    grid: tuple[int, int, int]
    text: int = 256

    @property
    def video(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def joint(self) -> int:
        return self.video + self.text

    @property
    def filled(self) -> int:
        """Text tokens that are no padding."""
        return int(self.text * FILLED)


def tokens(name: str, frames: int, height: int, width: int, text: int = 256) -> Tokens:
    """Tokens of a clip: the autoencoder takes 4 x 8 x 8 to one, patches 1 x 2 x 2."""
    return Tokens(name, ((frames - 1) // 4 + 1, height // 16, width // 16), text)


CLIP_720P_129 = tokens("720p-129f", 129, 720, 1280)
CLIP_480P_65 = tokens("480p-65f", 65, 480, 848)
# 33,024 tokens with the text
CLIP_1024P_29 = tokens("1024p-29f", 29, 1024, 1024)
CLIP_256P_65 = tokens("256p-65f", 65, 256, 256)
CLIP_256P_33 = tokens("256p-33f", 33, 256, 256)
CLIP_128P_13 = tokens("128p-13f", 13, 128, 128, text=64)
IMAGE_256P = tokens("256p-image", 1, 256, 256)


@dataclass(frozen=True)
class Clip:
    """Pixels of one clip, and the latents that the autoencoder makes of them."""

    name: str
    frames: int
    height: int
    width: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


PIXELS_720P_129 = Clip("720p-129f", 129, 720, 1280)
PIXELS_480P_65 = Clip("480p-65f", 65, 480, 848)
PIXELS_256P_17 = Clip("256p-17f", 17, 256, 256)
PIXELS_512P_IMAGE = Clip("512p-image", 1, 512, 512)
PIXELS_NANO = Clip("nano", 17, 96, 96)
# The head of the autoencoder's attention: one, as wide as its middle.
VAE_HEAD_DIM, NANO_VAE_HEAD_DIM = 512, 64

# The embedded miniature: 96 x 96, 17 frames, short captions, heads of 64 features.
NANO = tokens("nano", 17, 96, 96, text=32)
# The text as long as its encoder pads it.
NANO_PADDED = tokens("nano", 17, 96, 96, text=39)
NANO_HIDDEN_SIZE, NANO_NUM_HEADS, NANO_HEAD_DIM = 192, 3, 64
NANO_ROPE_DIMS = (16, 24, 24)


@dataclass(frozen=True)
class Maps:
    """Feature maps of the VAE (B, C, T, H, W) and the groups of their norms."""

    name: str
    shape: tuple[int, int, int, int, int]
    groups: int = 32


# In the decoder of a clip of 17 x 256 x 256: the finest level, and the middle.
MAPS_FINE = Maps("256p-17f-fine", (1, 128, 17, 256, 256))
MAPS_WIDE = Maps("256p-17f-middle", (1, 512, 5, 32, 32))
# The finest level of the embedded miniature.
MAPS_NANO = Maps("nano-fine", (1, 16, 17, 96, 96), groups=4)
MAPS_QUICK = Maps("quick-maps", (1, 64, 3, 32, 32))
