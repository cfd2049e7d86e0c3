"""What a rehearsal pretends of a GPU is so: these tests hold on a real one as well."""

import gc

import pytest
import torch

from tests.kit import gpu

pytestmark = pytest.mark.gpu


@pytest.fixture
def x():
    return torch.arange(6.0, device="cuda").view(2, 3)


def test_tensors_say_where_they_are(x):
    assert x.is_cuda and x.device == torch.device("cuda", 0) and x.T[1:].is_cuda
    assert not x.cpu().is_cuda and x.cpu().cuda().is_cuda and x.to("cpu").device.type == "cpu"
    fresh = (
        x.new_zeros(2),
        torch.empty_like(x),
        torch.ones(2).to(x),
        torch.as_tensor([1], device="cuda"),
    )
    assert all(each.is_cuda for each in (*fresh, x.sum(), x.double(), x > 1, x[0, 0]))
    assert not torch.zeros_like(x, device="cpu").is_cuda and not torch.ones(2).is_cuda


def test_modules_move():
    layer = torch.nn.Linear(3, 2).cuda()
    assert layer.weight.is_cuda and layer(torch.ones(1, 3, device="cuda")).is_cuda
    layer(torch.ones(1, 3, device="cuda")).sum().backward()
    assert layer.weight.grad.is_cuda and not layer.cpu().weight.is_cuda


def test_two_devices_do_not_mix(x):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError):
        torch.equal(x, x.cpu())
    with pytest.raises(RuntimeError):
        x.cpu()[torch.tensor([0], device="cuda")]
    assert torch.equal((x * torch.tensor(2.0))[torch.tensor([1])].cpu(), 2 * x.cpu()[1:])
    assert torch.empty_like(x.cpu()).copy_(x).sum() == 15


def test_random_numbers_have_a_device():
    drawn = torch.Generator("cuda").manual_seed(3)
    assert torch.randn(4, generator=drawn, device="cuda").is_cuda and drawn.device.type == "cuda"
    for generator, device in ((drawn, "cpu"), (torch.Generator(), "cuda")):
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(4, generator=generator, device=device)
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.empty(4).normal_(generator=drawn)


def test_numbers_of_the_host_come_from_the_host(x):
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        x.numpy()
    assert x.tolist()[1] == [3, 4, 5] and float(x[1, 2]) == 5


def test_gradients_are_on_the_device_of_what_they_are_of(x):
    """Those of results that nobody uses too, which autograd makes itself."""
    seen = []

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t * 2, t * 3

        @staticmethod
        def backward(ctx, *gradients):
            seen.extend(gradients)
            return gradients[0] * 2 + gradients[1]

    leaf = x.clone().requires_grad_()
    used, _ = Both.apply(leaf)
    used.sum().backward()
    assert all(each.is_cuda for each in (*seen, leaf.grad)) and len(seen) == 2


def test_memory_is_counted():
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    room = torch.zeros(2**18, device="cuda")
    assert torch.cuda.memory_allocated() - before == 2**20
    del room
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 2**20


def test_events_and_streams(x):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        x.sum()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0


def test_a_graph_computes_anew(x):
    def call():
        return (x * 2 + torch.ones(3, device="cuda")).sum(0)

    call()  # kernels load
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.mul_(10)
    graph.replay()
    assert y.tolist() == [62, 102, 142]


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero])
def test_the_host_is_heard_to_wait(x, wait):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            wait(x.sum())
        (x * 2).add_(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.cpu])
def test_a_graph_does_not_wait(x, wait):
    if not gpu.rehearsed:
        pytest.skip("a capture that fails may leave a real device unusable")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait(x.sum())
