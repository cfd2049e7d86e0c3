"""Names of the transformer's parameters and settings in the official and the diffusers layout."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.dit.refiner import DEPTH as REFINER_DEPTH
from hunyuan_fast.models.dit.refiner import MLP_WIDTH_RATIO as REFINER_RATIO
from hunyuan_fast.models.weights.rule import Rule


class Layer(NamedTuple):
    """A native layer, and the layers that hold its rows in diffusers: {name: number of rows}."""

    native: str
    parts: dict[str, int]
    has_bias: bool = True
    swap_halves: bool = False


def rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """One rule for every parameter of the model of ``config``."""
    return tuple(rule for layer in _layers(config) for rule in _parameter_rules(layer))


def _parameter_rules(layer: Layer) -> Iterator[Rule]:
    for kind in ("weight", "bias") if layer.has_bias else ("weight",):
        names = tuple(f"{part}.{kind}" for part in layer.parts)
        yield Rule(f"{layer.native}.{kind}", names, tuple(layer.parts.values()), layer.swap_halves)


def _layers(config: TransformerConfig) -> Iterator[Layer]:
    yield from _ends(config)
    for r in range(REFINER_DEPTH):
        native = f"txt_in.individual_token_refiner.blocks.{r}."
        yield from _inside(
            native, f"context_embedder.token_refiner.refiner_blocks.{r}.", _refiner_block(config)
        )
    for i in range(config.mm_double_blocks_depth):
        yield from _inside(f"double_blocks.{i}.", f"transformer_blocks.{i}.", _double_block(config))
    for j in range(config.mm_single_blocks_depth):
        yield from _inside(
            f"single_blocks.{j}.", f"single_transformer_blocks.{j}.", _single_block(config)
        )


def _inside(native: str, diffusers: str, layers: Iterable[Layer]) -> Iterator[Layer]:
    for layer in layers:
        parts = {diffusers + name: rows for name, rows in layer.parts.items()}
        yield layer._replace(native=native + layer.native, parts=parts)


def _ends(config: TransformerConfig) -> Iterator[Layer]:
    e = config.hidden_size
    pt, ph, pw = config.patch_size
    text, condition = "context_embedder.time_text_embed", "time_text_embed"

    yield Layer("img_in.proj", {"x_embedder.proj": e})
    yield Layer("txt_in.input_embedder", {"context_embedder.proj_in": e})
    yield Layer("txt_in.t_embedder.mlp.0", {f"{text}.timestep_embedder.linear_1": e})
    yield Layer("txt_in.t_embedder.mlp.2", {f"{text}.timestep_embedder.linear_2": e})
    yield Layer("txt_in.c_embedder.linear_1", {f"{text}.text_embedder.linear_1": e})
    yield Layer("txt_in.c_embedder.linear_2", {f"{text}.text_embedder.linear_2": e})
    yield Layer("time_in.mlp.0", {f"{condition}.timestep_embedder.linear_1": e})
    yield Layer("time_in.mlp.2", {f"{condition}.timestep_embedder.linear_2": e})
    yield Layer("vector_in.in_layer", {f"{condition}.text_embedder.linear_1": e})
    yield Layer("vector_in.out_layer", {f"{condition}.text_embedder.linear_2": e})
    if config.guidance_embed:
        yield Layer("guidance_in.mlp.0", {f"{condition}.guidance_embedder.linear_1": e})
        yield Layer("guidance_in.mlp.2", {f"{condition}.guidance_embedder.linear_2": e})
    yield Layer("final_layer.linear", {"proj_out": config.out_channels * pt * ph * pw})
    # (shift, scale) natively, (scale, shift) there
    yield Layer("final_layer.adaLN_modulation.1", {"norm_out.linear": 2 * e}, swap_halves=True)


def _refiner_block(config: TransformerConfig) -> Iterator[Layer]:
    e = config.hidden_size
    yield Layer("norm1", {"norm1": e})
    yield Layer("norm2", {"norm2": e})
    yield Layer("self_attn_qkv", {"attn.to_q": e, "attn.to_k": e, "attn.to_v": e})
    yield Layer("self_attn_proj", {"attn.to_out.0": e})
    yield Layer("mlp.fc1", {"ff.net.0.proj": REFINER_RATIO * e})
    yield Layer("mlp.fc2", {"ff.net.2": e})
    yield Layer("adaLN_modulation.1", {"norm_out.linear": 2 * e})


def _double_block(config: TransformerConfig) -> Iterator[Layer]:
    e, d, width = config.hidden_size, config.head_dim, config.mlp_width

    yield Layer("img_mod.linear", {"norm1.linear": 6 * e})
    yield Layer("img_attn_qkv", {"attn.to_q": e, "attn.to_k": e, "attn.to_v": e})
    yield Layer("img_attn_q_norm", {"attn.norm_q": d}, has_bias=False)
    yield Layer("img_attn_k_norm", {"attn.norm_k": d}, has_bias=False)
    yield Layer("img_attn_proj", {"attn.to_out.0": e})
    yield Layer("img_mlp.fc1", {"ff.net.0.proj": width})
    yield Layer("img_mlp.fc2", {"ff.net.2": e})

    yield Layer("txt_mod.linear", {"norm1_context.linear": 6 * e})
    yield Layer("txt_attn_qkv", {"attn.add_q_proj": e, "attn.add_k_proj": e, "attn.add_v_proj": e})
    yield Layer("txt_attn_q_norm", {"attn.norm_added_q": d}, has_bias=False)
    yield Layer("txt_attn_k_norm", {"attn.norm_added_k": d}, has_bias=False)
    yield Layer("txt_attn_proj", {"attn.to_add_out": e})
    yield Layer("txt_mlp.fc1", {"ff_context.net.0.proj": width})
    yield Layer("txt_mlp.fc2", {"ff_context.net.2": e})


def _single_block(config: TransformerConfig) -> Iterator[Layer]:
    e, d, width = config.hidden_size, config.head_dim, config.mlp_width
    yield Layer("linear1", {"attn.to_q": e, "attn.to_k": e, "attn.to_v": e, "proj_mlp": width})
    yield Layer("linear2", {"proj_out": e})
    yield Layer("q_norm", {"attn.norm_q": d}, has_bias=False)
    yield Layer("k_norm", {"attn.norm_k": d}, has_bias=False)
    yield Layer("modulation.linear", {"norm.linear": 3 * e})


# Settings that diffusers can vary and this model cannot, with the one value that fits.
FIXED = {"num_refiner_layers": REFINER_DEPTH, "qk_norm": "rms_norm", "image_condition_type": None}


def config_to_diffusers(config: TransformerConfig) -> dict[str, Any]:
    """The settings of diffusers' HunyuanVideoTransformer3DModel.

    Raises ValueError for a patch that is not square in space, which diffusers cannot express.
    """
    pt, ph, pw = config.patch_size
    if ph != pw:
        raise ValueError(
            f"patch_size must be square in space for diffusers, got {config.patch_size}"
        )
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_attention_heads": config.heads_num,
        "attention_head_dim": config.head_dim,
        "num_layers": config.mm_double_blocks_depth,
        "num_single_layers": config.mm_single_blocks_depth,
        "mlp_ratio": config.mlp_width_ratio,
        "patch_size": ph,
        "patch_size_t": pt,
        "guidance_embeds": config.guidance_embed,
        "text_embed_dim": config.text_states_dim,
        "pooled_projection_dim": config.text_states_dim_2,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_dim_list),
        **FIXED,
    }


def config_from_diffusers(settings: Mapping[str, Any]) -> TransformerConfig:
    """The config that the settings in a diffusers config.json describe.

    Settings it leaves out take the values of the 13B model, which are diffusers' defaults.
    Raises ValueError for another class of model and for settings this model has no counterpart of.
    """
    class_name = settings.get("_class_name", "HunyuanVideoTransformer3DModel")
    if class_name != "HunyuanVideoTransformer3DModel":
        raise ValueError(f"_class_name must be HunyuanVideoTransformer3DModel, got {class_name}")
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value!r} in a text-to-video model, got {settings[name]!r}"
            )

    base = config_to_diffusers(TransformerConfig())
    s = {name: settings.get(name, value) for name, value in base.items()}
    return TransformerConfig(
        hidden_size=s["num_attention_heads"] * s["attention_head_dim"],
        heads_num=s["num_attention_heads"],
        mlp_width_ratio=s["mlp_ratio"],
        mm_double_blocks_depth=s["num_layers"],
        mm_single_blocks_depth=s["num_single_layers"],
        rope_dim_list=tuple(s["rope_axes_dim"]),
        patch_size=(s["patch_size_t"], s["patch_size"], s["patch_size"]),
        in_channels=s["in_channels"],
        out_channels=s["out_channels"] or s["in_channels"],
        text_states_dim=s["text_embed_dim"],
        text_states_dim_2=s["pooled_projection_dim"],
        guidance_embed=s["guidance_embeds"],
        rope_theta=s["rope_theta"],
    )
