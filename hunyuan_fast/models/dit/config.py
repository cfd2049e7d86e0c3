"""The shape of a HunyuanVideo diffusion transformer."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are the released guidance-distilled 13B model.

    hidden_size, heads_num: E and N; a head has D = E / N features
    mlp_width_ratio: width of the feed-forward networks of the blocks, in units of E
    rope_dim_list: features of a head turned by the position in (T, H, W); even, D in all
    patch_size: latent frames, rows and columns in a token
    in_channels, out_channels: channels of the latents and of the velocity
    text_states_dim, text_states_dim_2: widths of the text states and of the pooled text vector
    guidance_embed: whether the model takes the scale of its guidance as an input
    rope_theta: base of the rotary frequencies

    Raises ValueError for sizes that do not fit together.
    """

    hidden_size: int = 3072
    heads_num: int = 24
    mlp_width_ratio: float = 4.0
    mm_double_blocks_depth: int = 20
    mm_single_blocks_depth: int = 40
    rope_dim_list: tuple[int, int, int] = (16, 56, 56)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int = 16
    text_states_dim: int = 4096
    text_states_dim_2: int = 768
    guidance_embed: bool = True
    rope_theta: float = 256.0

    def __post_init__(self) -> None:
        for name in ("rope_dim_list", "patch_size"):
            value = tuple(getattr(self, name))  # JSON brings lists
            if len(value) != 3 or min(value) < 1:
                raise ValueError(
                    f"{name} must be three positive integers for (T, H, W), got {value}"
                )
            object.__setattr__(self, name, value)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and value < (0 if field.name.endswith("_depth") else 1):
                raise ValueError(f"{field.name} must be positive, got {value}")
        if self.hidden_size % self.heads_num:
            raise ValueError(
                f"hidden_size must be a multiple of heads_num = {self.heads_num}, "
                f"got {self.hidden_size}"
            )
        if any(dim % 2 for dim in self.rope_dim_list) or sum(self.rope_dim_list) != self.head_dim:
            raise ValueError(
                f"rope_dim_list must be even numbers with the sum hidden_size / heads_num = "
                f"{self.head_dim}, got {self.rope_dim_list}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads_num

    @property
    def mlp_width(self) -> int:
        return int(self.hidden_size * self.mlp_width_ratio)
