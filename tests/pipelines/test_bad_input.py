"""Bad input: every case is refused in one sentence, before any network is touched."""

import re
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_fast.models.dit.config import TransformerConfig
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.models.weights import CheckpointError
from hunyuan_fast.pipelines import GenerationDefaults, HunyuanVideoPipeline, PipelineSettings
from hunyuan_fast.pipelines.inputs import Limits, read_request
from tests.kit.text import TEMPLATE

NAN, INF = float("nan"), float("inf")
LIMITS = Limits(transformer=TransformerConfig(), vae=VAEConfig(), defaults=GenerationDefaults())
CALL: dict[str, Any] = {
    "prompt": "a star",
    "height": None,
    "width": None,
    "num_frames": None,
    "num_inference_steps": None,
    "guidance_scale": None,
    "true_cfg_scale": 1.0,
    "negative_prompt": None,
    "shift": None,
    "seed": 0,
    "num_videos": 1,
    "latents": None,
    "output_type": "uint8",
    "progress": None,
}

# argument: values of the right type that cannot be used, and what the message says of them
BAD_VALUES: dict[str, list[tuple[Any, str]]] = {
    "num_frames": [
        # what diffusers rounds down in silence
        (8, "4n + 1, from 1 to 4097, got 8; nearest valid: 5 or 9"),
        (10, "got 10; nearest valid: 9 or 13"),
        (11, "got 11; nearest valid: 9 or 13"),
        (12, "got 12; nearest valid: 9 or 13"),
        (2, "got 2; nearest valid: 1 or 5"),
        (128, "got 128; nearest valid: 125 or 129"),
        (0, "got 0; nearest valid: 1"),
        (-3, "got -3; nearest valid: 1"),
        (4 * 10**9 + 1, "nearest valid: 4097"),
        (10**5000, "got about 2**16610; nearest valid: 4097"),
    ],
    "height": [
        (721, "a multiple of 16, from 16 to 16384 pixels, got 721; nearest valid: 720 or 736"),
        (8, "got 8; nearest valid: 16"),
        (0, "got 0; nearest valid: 16"),
        (-16, "got -16; nearest valid: 16"),
        (10**12, "nearest valid: 16384"),
    ],
    "width": [
        (1284, "got 1284; nearest valid: 1280 or 1296"),
        (0, "got 0; nearest valid: 16"),
        (-1280, "got -1280; nearest valid: 16"),
        (2**31, "nearest valid: 16384"),
    ],
    "num_inference_steps": [(n, f"from 1 to 1000, got {n}") for n in (0, -1, 1001, 10**6)],
    "guidance_scale": [
        (NAN, "at least 0 and at most 60, got nan; the released model was distilled for 1 to 8"),
        (INF, "got inf"),
        (-INF, "got -inf"),
        (-1, "got -1.0"),
        (1e9, "got 1000000000.0"),
        (10**400, "got inf"),
    ],
    "true_cfg_scale": [
        (0.5, "at least 1 and at most 100, got 0.5; 1 switches classifier-free guidance off"),
        (0, "got 0.0"),
        (-2, "got -2.0"),
        (NAN, "got nan"),
        (INF, "got inf"),
        (1e6, "got 1000000.0"),
    ],
    "shift": [
        (0, "above 0 and at most 1000, got 0.0; leave it out"),
        (-7.0, "got -7.0"),
        (NAN, "got nan"),
        (INF, "got inf"),
        (1e4, "got 10000.0"),
    ],
    "seed": [(-1, "got -1"), (2**63, "got 9223372036854775808"), (10**4000, "got about 2**13288")],
    "num_videos": [(n, f"from 1 to 1024, got {n}") for n in (0, -2, 1025, 10**9)],
    "prompt": [
        ([], "must hold 1 to 1024 strings, got 0"),
        (["a"] * 1025, "must hold 1 to 1024 strings, got 1025"),
        ("a" * 100_001, "must have at most 100000 characters, got 100001; shorten it"),
        ("a \ud800", "text without NUL and lone surrogates"),
        ("a\x00b", r"text without NUL and lone surrogates, got 'a\x00b'; remove"),
    ],
    "negative_prompt": [
        ("grey", "None with true_cfg_scale 1, got 'grey'; set true_cfg_scale above 1"),
        ("", "None with true_cfg_scale 1, got ''"),
    ],
    "output_type": [("pil", "one of 'uint8', 'float', 'latent', got 'pil'"), ("", "got ''")],
}

# argument: values of a type that the argument does not have
BAD_TYPES: dict[str, list[Any]] = {
    "num_frames": [9.0, "9", True, [9], NAN],
    "height": [720.0, "720", True, INF, torch.tensor([720.0]), np.float32(720)],
    "width": [1280.5, (720, 1280), b"1280", {}],
    "num_inference_steps": [50.0, "50", NAN, True],
    "guidance_scale": ["6", True, 6j, [6.0], torch.tensor(6.0)],
    "true_cfg_scale": [None, "2", True],
    "shift": ["auto", False, [7.0]],
    "seed": [1.5, None, "42", True, [1, 2], torch.Generator()],
    "num_videos": [2.0, None, "2", True],
    "prompt": [None, b"a star", 3, {"text": "a"}, {"a"}, NAN],
    "output_type": [None, torch.uint8, 8],
    "progress": [1, True, "bar"],
    "latents": [[0.0], np.zeros((1, 16, 3, 4, 6)), "noise"],
}

SMALL = {"height": 32, "width": 48, "num_frames": 9}
SHAPE = (1, 16, 3, 4, 6)


def noise(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape or SHAPE, **options)


# name: arguments that are bad together or inside, the error, and what the message says
BAD_TOGETHER: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too_many_tokens": (
        {"height": 4096, "width": 4096, "num_frames": 1025},
        ValueError,
        "height, width and num_frames must give at most 2097152 video tokens, got 16842752",
    ),
    "seed_overflow": ({"seed": 2**63 - 1, "num_videos": 2}, ValueError, "video i uses seed + i"),
    "batch_too_large": (
        {"prompt": ["a"] * 600, "num_videos": 2},
        ValueError,
        "num_videos must be at most 1 for 600 prompts",
    ),
    "prompt_with_none": (
        {"prompt": ["a", None]},
        TypeError,
        "prompt[1] must be a string, got",
    ),
    "prompt_with_number": ({"prompt": [1, "a"]}, TypeError, "prompt[0] must be a string, got 1"),
    "prompt_nested": ({"prompt": [["a"]]}, TypeError, "prompt[0] must be a string, got ['a']"),
    "prompt_with_bytes": ({"prompt": [b"a"]}, TypeError, "decode it first"),
    "negative_bytes": (
        {"negative_prompt": b"grey", "true_cfg_scale": 2},
        TypeError,
        "negative_prompt must be a string, got b'grey' of type bytes",
    ),
    "negative_number": (
        {"negative_prompt": 1, "true_cfg_scale": 2},
        TypeError,
        "negative_prompt must be a string or a list of strings, got 1 of type int",
    ),
    "negative_empty_list": (
        {"negative_prompt": [], "true_cfg_scale": 2},
        ValueError,
        "negative_prompt must hold 1 to 1024 strings, got 0",
    ),
    "negative_too_many": (
        {"prompt": ["a", "b"], "negative_prompt": ["x"] * 3, "true_cfg_scale": 2},
        ValueError,
        "negative_prompt must be one string or 2 as prompt, got 3",
    ),
    "negative_too_few": (
        {"prompt": ["a", "b", "c"], "negative_prompt": ["x"] * 2, "true_cfg_scale": 2},
        ValueError,
        "negative_prompt must be one string or 3 as prompt, got 2",
    ),
    "negative_with_none": (
        {"negative_prompt": [None], "true_cfg_scale": 2},
        TypeError,
        "negative_prompt[0] must be a string",
    ),
    "latents_int": ({"latents": noise(dtype=torch.int64)}, TypeError, "got torch.int64"),
    "latents_bool": ({"latents": noise(dtype=torch.bool)}, TypeError, "got torch.bool"),
    "latents_complex": (
        {"latents": noise(dtype=torch.complex64)},
        TypeError,
        "got torch.complex64",
    ),
    # what diffusers turns into a clip of another length
    "latents_frames": (
        {"latents": noise(1, 16, 2, 4, 6)},
        ValueError,
        "(B, C, T, H, W) = (1, 16, 3, 4, 6) for these prompts and this size, got (1, 16, 2, 4, 6)",
    ),
    "latents_channels": ({"latents": noise(1, 8, 3, 4, 6)}, ValueError, "got (1, 8, 3, 4, 6)"),
    "latents_height": ({"latents": noise(1, 16, 3, 2, 6)}, ValueError, "got (1, 16, 3, 2, 6)"),
    "latents_width": ({"latents": noise(1, 16, 3, 4, 8)}, ValueError, "got (1, 16, 3, 4, 8)"),
    "latents_batch": ({"latents": noise(2, 16, 3, 4, 6)}, ValueError, "got (2, 16, 3, 4, 6)"),
    "latents_rank": ({"latents": noise(16, 3, 4, 6)}, ValueError, "got (16, 3, 4, 6)"),
    "latents_empty": ({"latents": torch.empty(0)}, ValueError, "got (0,)"),
    "latents_for_one_of_two": ({"latents": noise(), "num_videos": 2}, ValueError, "= (2, 16, 3"),
    "latents_nan": ({"latents": noise() + NAN}, ValueError, "must be finite, got 1152 NaN"),
    "latents_inf": ({"latents": noise() + INF}, ValueError, "must be finite, got 1152 NaN"),
    "latents_beyond_float32": (
        {"latents": torch.full(SHAPE, 1e300, dtype=torch.float64)},
        ValueError,
        "latents must be finite",
    ),
    "latents_meta": ({"latents": noise(device="meta")}, ValueError, "latents must hold data"),
}


class Untouchable:
    """Stands for a network and fails the test when anything but its sizes is asked for."""

    def __init__(self, **sizes: Any) -> None:
        self.__dict__.update(sizes)

    def eval(self) -> "Untouchable":
        return self

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"heavy work began: {name} was used")


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Pipeline of the released sizes without networks."""
    config, vae, text, pooled = TransformerConfig(), VAEConfig(), 4096, 768
    parts: list[Any] = [{"config": config}, {"config": vae}, {"dim": text}, {"dim": pooled}]
    return HunyuanVideoPipeline(
        *(Untouchable(**part) for part in parts),  # type: ignore[arg-type]
        settings=PipelineSettings(prompt_template=TEMPLATE),
    )


def refuse(pipe: Any, arguments: dict[str, Any], error: type[Exception], words: str) -> str:
    """Call the pipeline; check that it refuses in one clear sentence, at once."""
    start = time.process_time()
    with pytest.raises(error, match=re.escape(words)) as caught:
        pipe(**{"prompt": "a star", **arguments})
    assert time.process_time() - start < 0.1
    assert type(caught.value) is error
    message = str(caught.value)
    assert "must" in message and "got" in message and "\n" not in message and len(message) < 300
    return message


def named(table: dict[str, list[Any]]) -> list[Any]:
    """Cases of a table, each with a name made of the argument and the value."""
    cases = []
    for argument, entries in table.items():
        for entry in entries:
            value = entry[0] if isinstance(entry, tuple) and table is BAD_VALUES else entry
            text = f"2**{value.bit_length()}" if isinstance(value, int) else repr(value)
            cases.append(pytest.param(argument, entry, id=f"{argument}={ascii(text)[1:25]}"))
    return cases


@pytest.mark.parametrize(("argument", "case"), named(BAD_VALUES))
def test_bad_value_is_refused(pipe: Any, argument: str, case: tuple[Any, str]) -> None:
    value, words = case
    message = refuse(pipe, {argument: value}, ValueError, words)
    assert message.startswith(f"{argument} must ")


@pytest.mark.parametrize(("argument", "value"), named(BAD_TYPES))
def test_bad_type_is_refused(pipe: Any, argument: str, value: Any) -> None:
    message = refuse(pipe, {argument: value}, TypeError, f"of type {type(value).__name__}")
    assert message.startswith(f"{argument} must be ")


@pytest.mark.parametrize("name", BAD_TOGETHER)
def test_bad_combination_is_refused(pipe: Any, name: str) -> None:
    arguments, error, words = BAD_TOGETHER[name]
    if name.startswith("latents"):
        arguments = SMALL | arguments
    refuse(pipe, arguments, error, words)


def test_there_are_enough_cases() -> None:
    assert len(named(BAD_VALUES)) + len(named(BAD_TYPES)) + len(BAD_TOGETHER) >= 120


@pytest.mark.parametrize("extra", ["generator", "prompt_embeds", "sigmas", "num_frame"])
def test_unknown_argument_is_refused(pipe: Any, extra: str) -> None:
    with pytest.raises(TypeError, match=extra):
        pipe("a star", **{extra: None})


def test_defaults_fill_in_for_none() -> None:
    request = read_request(LIMITS, CALL | {"prompt": ""})
    assert request.latent_shape == (1, 16, 33, 90, 160)
    assert (request.num_inference_steps, request.guidance_scale) == (50, 6.0)
    assert request.shift is None and request.negative_prompts is None


def test_unusual_but_good_arguments_are_accepted() -> None:
    arguments = {
        "prompt": ("a", "b"),
        "height": np.int64(16),
        "width": torch.tensor(16),
        "num_frames": 1,
        "guidance_scale": np.float32(2.5),
        "seed": 2**63 - 4,
        "num_videos": 2,
        "true_cfg_scale": 2,
        "negative_prompt": ["x", "y"],
        "latents": torch.zeros(4, 16, 1, 2, 2, dtype=torch.float64),
    }
    request = read_request(LIMITS, CALL | arguments)
    assert request.prompts == ("a", "a", "b", "b")
    assert request.negative_prompts == ("x", "x", "y", "y")
    assert request.seeds == tuple(2**63 - 4 + i for i in range(4))
    assert (request.height, request.width, request.guidance_scale) == (16, 16, 2.5)
    assert request.latents is not None and request.latents.dtype == torch.float32


def test_patches_in_time_widen_the_steps_of_frames() -> None:
    limits = Limits(
        transformer=TransformerConfig(patch_size=(2, 2, 2)),
        vae=VAEConfig(),
        defaults=GenerationDefaults(num_frames=125),
    )
    # two latent frames to a patch: 8n + 5 frames
    assert read_request(limits, CALL).latent_shape[2] == 32
    with pytest.raises(ValueError, match=r"8n \+ 5, .*got 129; nearest valid: 125 or 133"):
        read_request(limits, CALL | {"num_frames": 129})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.complex_numbers(),
    st.builds(torch.zeros, st.lists(st.integers(0, 2), max_size=5)),
)


@settings(max_examples=500, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(CALL)), JUNK, min_size=1, max_size=4))
def test_junk_gives_a_request_or_a_typed_error(changes: dict[str, Any]) -> None:
    try:
        request = read_request(LIMITS, CALL | changes)
    except (TypeError, ValueError) as error:
        assert any(name in str(error) for name in changes)
    else:
        assert len(request.prompts) == len(request.seeds) == request.latent_shape[0]


BAD_LOADING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype_name": ({"dtype": "fp99"}, ValueError, "dtype must be one of float32, .*got 'fp99'"),
    "dtype_integer": ({"dtype": torch.int8}, ValueError, r"dtype .*got torch\.int8"),
    "dtype_double": ({"dtype": torch.float64}, ValueError, r"dtype .*got torch\.float64"),
    "dtype_class": ({"dtype": float}, TypeError, r"dtype must be a torch\.dtype"),
    "dtype_number": ({"dtype": 16}, TypeError, r"dtype must be a torch\.dtype.*of type int"),
    "attention_precision": (
        {"attention_precision": "int8"},
        ValueError,
        "attention_precision must be one of 'same', 'fp8', got 'int8'",
    ),
    "attention_precision_none": (
        {"attention_precision": None},
        TypeError,
        "attention_precision .*of type NoneType",
    ),
    "device_unknown": ({"device": "gpu"}, ValueError, "device .*got 'gpu'"),
    "device_meta": ({"device": "meta"}, ValueError, "device must be a CPU or CUDA device"),
    "device_number": ({"device": 0}, TypeError, "device .*got 0 of type int"),
    "device_none": ({"device": None}, TypeError, "device .*of type NoneType"),
    "device_far": ({"device": "cuda:99"}, ValueError, "device .*got 'cuda:99'; use \"cpu\""),
}


@pytest.mark.parametrize("name", BAD_LOADING)
def test_bad_loading_is_refused_before_the_folder_is_looked_at(name: str) -> None:
    arguments, error, message = BAD_LOADING[name]
    with pytest.raises(error, match=message):
        HunyuanVideoPipeline.from_pretrained("/does/not/exist", **arguments)


@pytest.mark.parametrize("folder", ["/does/not/exist", "no-such-model", "../nowhere"])
def test_unknown_model_is_named(folder: str) -> None:
    with pytest.raises(CheckpointError, match=folder):
        HunyuanVideoPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vae": VAEConfig(latent_channels=8)}, r"vae\.latent_channels .*= 16, got 8"),
        ({"llm": 2048}, "text_encoder must have .*text_states_dim = 4096, got 2048"),
        ({"clip": 1024}, "text_encoder_2 must have .*text_states_dim_2 = 768, got 1024"),
        ({"transformer": TransformerConfig(out_channels=8)}, r"transformer\.out_channels .*got 8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"transformer": TransformerConfig(), "vae": VAEConfig()}
    sizes |= {"llm": 4096, "clip": 768} | parts
    transformer: Any = Untouchable(config=sizes["transformer"])
    vae: Any = Untouchable(config=sizes["vae"])
    llm: Any = SimpleNamespace(dim=sizes["llm"])
    clip: Any = SimpleNamespace(dim=sizes["clip"])
    with pytest.raises(ValueError, match=message):
        HunyuanVideoPipeline(
            transformer, vae, llm, clip, PipelineSettings(prompt_template=TEMPLATE)
        )
