"""What keeps cuDNN from wrong values: refused versions, full precision, the map it is given."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hunyuan_fast.kernels.causal_conv3d import library_impl
from hunyuan_fast.kernels.causal_conv3d.reference import full_precision
from tests.ops.causal_conv3d_cases import channels_last

HALVES = (torch.bfloat16, torch.float16)


def answer(monkeypatch, version, *, dtype=torch.bfloat16, kernel=3, device="cuda", cuda="13.0"):
    """What the library's implementation says beside this cuDNN; no GPU is needed."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with FakeTensorMode():
        x = torch.empty(1, 16, 5, 8, 8, dtype=dtype, device=device)
        weight = torch.empty(16, 16, *(kernel,) * 3, dtype=dtype, device=device)
        return library_impl.supports(x, weight, None, (1, 1, 1), None, None)


@pytest.mark.parametrize("version", [90800, 91002, 91400])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_versions_that_return_wrong_values_are_refused(version, dtype, monkeypatch):
    reason = answer(monkeypatch, version, dtype=dtype)
    assert f"cuDNN 9.{version // 100 % 100}.{version % 100} returns wrong values" in reason
    assert str(dtype) in reason and "pip install 'nvidia-cudnn-cu13>=9.15'" in reason


@pytest.mark.parametrize("version", [90701, 91500, 91701, None])
def test_other_versions_answer(version, monkeypatch):
    assert answer(monkeypatch, version) is None


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float32}, {"kernel": 1}, {"device": "cpu"}, {"cuda": None}], ids=str
)
def test_calls_that_the_mistake_does_not_concern_are_answered(options, monkeypatch):
    assert answer(monkeypatch, 91002, **options) is None


def test_convolutions_in_fp32_are_never_cut_to_tf32(monkeypatch):
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
    with pytest.raises(KeyError), full_precision(x):
        assert settings.fp32_precision == "ieee"
        raise KeyError
    assert settings.fp32_precision == before
    with full_precision(torch.empty(1)):
        assert settings.fp32_precision == before


@pytest.mark.parametrize("past", [None, 0, 1, 2])
@pytest.mark.parametrize("margins", [(2, 1, 1), (0, 1, 1), (1, 2, 0), (0, 0, 0)], ids=str)
def test_the_padded_map_of_gpus_is_channels_last(margins, past, generator):
    x = channels_last(torch.randn(2, 3, 2, 3, 4, generator=generator))
    before = None if past is None else torch.randn(2, 3, past, 3, 4, generator=generator)
    frames, rows, columns = margins
    whole = library_impl._joined(x, before)
    sides = (columns, columns, rows, rows, frames, 0)
    expected = torch.nn.functional.pad(whole, sides, mode="replicate")
    padded = library_impl.padded_channels_last(x, before, library_impl.Margins(*margins))
    assert torch.equal(padded, expected)
    assert padded.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.gpu
def test_the_library_is_as_exact_in_fp32_on_a_gpu(generator):
    x = channels_last(torch.randn(1, 32, 3, 9, 9, generator=generator)).cuda()
    weight = torch.randn(32, 32, 3, 3, 3, generator=generator).cuda()
    results = [
        library_impl.forward(x.to(dtype), weight.to(dtype), None, (1, 1, 1), None, None)
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-5, atol=1e-4)
