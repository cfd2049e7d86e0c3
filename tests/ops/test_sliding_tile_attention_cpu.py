"""Sliding-tile attention in C++: instruction sets, threads, groups, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations
from tests.kit.numerics import assert_equal
from tests.ops.sliding_tile_attention_cases import ROOM, draw_call, judge, run

if "cpu_impl" not in implementations(ROOM):
    reason = explain(ROOM, *draw_call(torch.Generator()).arguments)["cpu_impl"]
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_keys_and_of_queries(dtype, generator):
    """More tokens in a group than a block takes: 432 queries, and keys in several turns."""
    sizes = {"grid": (3, 12, 24), "tile": (3, 12, 12), "windows": ((1, 1, 1), (1, 1, 2))}
    call = draw_call(generator, text=30, lengths=(894, 500), head_dim=40, dtype=dtype, **sizes)
    impl = implementations(ROOM)["cpu_impl"]
    out, lse = impl.forward(*call.arguments)
    expected, expected_lse = implementations(ROOM)["reference"].forward(*call.arguments)
    digits = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    )
    torch.testing.assert_close(out, expected, **digits)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_the_number_of_threads_does_not_matter(generator):
    call = draw_call(generator, lengths=(23, 20, 7), windows=((1, 1, 1), (9, 9, 9), (1, 2, 1)))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(implementations(ROOM)["cpu_impl"].forward(*call.arguments))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        for result, expected in zip(results, found[0], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_heads_of_one_window_and_samples_of_one_length_share_groups(generator):
    together = draw_call(generator, lengths=(20, 20), windows=((1, 1, 1), (1, 2, 1), (1, 1, 1)))
    out = run("cpu_impl", together)[0]
    for item in range(2):
        alone = together.map(lambda x, item=item: x[item : item + 1])
        alone = type(alone)(**{**vars(alone), "lengths": (20,)})
        assert_equal(run("cpu_impl", alone)[0], out[item : item + 1])


@pytest.mark.parametrize("isa", ["plain", "avx2"])
def test_without_avx_torch_answers_in_fp32(isa, generator, monkeypatch):
    impl = implementations(ROOM)["cpu_impl"]
    monkeypatch.setattr(impl._C, "cpu_isa", lambda: isa)
    for dtype in (torch.float32, torch.bfloat16):
        reason = explain(ROOM, *draw_call(generator, dtype=dtype).arguments)["cpu_impl"]
        slower = isa == "plain" and dtype == torch.float32
        assert reason == ("library_impl is faster for this call" if slower else None)


def test_refusals(generator):
    reasons = implementations(ROOM)["cpu_impl"].supports
    call = draw_call(generator)
    assert reasons(*call.arguments) is None
    assert "it is torch.float64" in reasons(*call.map(torch.Tensor.double).arguments)
    assert "empty" in reasons(*call.map(lambda x: x[:0]).arguments)
    assert "adjacent" in reasons(*call.map(lambda x: x.mT.contiguous().mT).arguments)
    assert "it is on meta" in reasons(*call.to("meta").arguments)


def test_the_native_function_checks_what_it_is_given(generator):
    from hunyuan_fast import _C

    call = draw_call(generator)
    q, k, v, windows, grid, tile, _, scale = call.arguments
    out, lse = torch.empty_like(q), torch.empty(1, 2, 23)
    good = [q, k, v, windows, grid, tile, None, scale, out, lse, 1]
    _C.sliding_tile_attention_forward_cpu(*good)
    for place, bad, message in (
        (1, k[:, :-1], "k does not fit the other tensors"),
        (3, windows[:1], "windows does not fit"),
        (3, windows.long(), "windows must be"),
        (4, (2, 3, 4), "grid must have at most L = 23 tokens"),
        (5, (2, 0, 2), "grid and tile must be positive"),
        (6, torch.tensor([24]), r"kv_len must lie in \[0, L\] = \[0, 23\], got 24"),
        (8, out.half(), "out must be"),
        (9, lse[..., :-1], "lse does not fit"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            _C.sliding_tile_attention_forward_cpu(*good[:place], bad, *good[place + 1 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_judged_as_others_are(dtype, generator):
    """A head of many features, of which no vector takes a whole number."""
    call = draw_call(generator, grid=(2, 4, 5), head_dim=130, lengths=(45, 31), dtype=dtype)
    judge("cpu_impl", run("cpu_impl", call), call)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_lower_instruction_sets(isa):
    here = Path(__file__)
    names = here.stem, f"{here.stem}_backward", "test_sliding_tile_attention"
    files = [str(here.with_name(f"{name}.py")) for name in names]
    wanted = (
        "cpu_impl and accurate and (partial or lengths) or blocks or judged "
        "or many and not equally or wide or threads_gives or else_is_written"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files] + ["-k", wanted],
        env={**os.environ, "HUNYUAN_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
