"""The benchmark of the VAE's convolutions: which layers it measures, and what cuDNN is given."""

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_causal_conv3d as bench
from benchmarks import shapes
from benchmarks.kit.case import FORWARD
from benchmarks.kit.clock import HostClock
from benchmarks.kit.measure import Setting, measure
from benchmarks.kit.pairing import Rounds
from benchmarks.vae_layers import Convolution, convolutions
from hunyuan_fast.models.vae.config import VAEConfig
from hunyuan_fast.ops import causal_conv3d

CPU = torch.device("cpu")
LAYERS = {
    "plain": Convolution("plain", (3, 5, 6), 8, 4),
    "down": Convolution("down", (5, 6, 6), 4, 4, stride=(2, 2, 2)),
    "up": Convolution("up", (3, 4, 3), 4, 4, factor=(2, 2, 2)),
    "shortcut": Convolution("shortcut", (3, 4, 4), 8, 4, kernel=1),
}


def test_every_kind_of_layer_is_there_once():
    for clip, label in ((shapes.PIXELS_720P_129, "720p"), (shapes.PIXELS_480P_65, "480p")):
        found = convolutions(VAEConfig(), clip, label)
        assert len({each.name for each in found}) == len(found) == 22
        assert all(each.half_bytes <= 6e9 for each in found)
        by_name = {each.name: each for each in found}
        height, width = clip.height, clip.width
        finest = by_name[f"{label}-decode-128-128ch-{height}x{width}"]
        assert finest.size[1:] == (height, width) and finest.factor is None
        up = by_name[f"{label}-decode-256-256ch-{height // 2}x{width // 2}-up222"]
        assert up.factor == (2, 2, 2) and up.out_size[1:] == (height, width)
        down = by_name[f"{label}-encode-256-256ch-{height // 2}x{width // 2}-down222"]
        assert down.stride == (2, 2, 2)
        assert by_name[f"{label}-decode-256-128ch-{height}x{width}-shortcut"].kernel == 1


def test_cases_of_a_gpu_are_told_apart():
    cases = bench._gpu_cases()
    keys = {(case.function, case.name, case.dtype) for case in cases}
    assert len(keys) == len(cases) == 22 + 22 + 10
    assert all(set(case.work) == {FORWARD} for case in cases)


@pytest.mark.parametrize("name", LAYERS)
def test_cudnn_convolves_what_ours_does(name):
    """On the CPU, where it is another library that does it."""
    case = replace(bench._gpu_case(LAYERS[name], torch.float32), rounds=None)
    once = Setting(CPU, HostClock(min_sample_seconds=0.0), Rounds(budget=1e3, least=1, most=1))
    found = measure("causal_conv3d", case, FORWARD, once)
    peers = [t for t in found.timings if t.kind == "peer"]
    assert len(peers) == 9 and not any("cuDNN" in peer for peer in found.declined)
    assert all(t.difference < 1e-5 for t in peers)


def test_what_was_padded_before_is_padded_once(monkeypatch):
    layer = LAYERS["plain"]
    calls = []
    padded = bench._padded
    monkeypatch.setattr(bench, "_padded", lambda *args: (calls.append(args), padded(*args))[1])
    x, weight, bias = torch.randn(1, 8, 3, 5, 6), torch.randn(4, 8, 3, 3, 3), torch.randn(4)
    for layout in (torch.channels_last_3d, torch.contiguous_format):
        for before, expected in ((True, 1), (False, 2)):
            calls.clear()
            call = bench._cudnn(layer, layout, padded_before=before)
            results = [call(x, weight, bias) for _ in range(2)]
            assert len(calls) == expected
            torch.testing.assert_close(results[1], causal_conv3d(x, weight, bias))
