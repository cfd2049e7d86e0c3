"""What attention over several processes sends, and how much of it is waited for."""

import time
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import group

from hunyuan_fast.distributed.mesh import Layout, build_mesh, group_of
from hunyuan_fast.distributed.shards import TokenShards, split_sizes
from hunyuan_fast.distributed.traffic import count_traffic
from hunyuan_fast.ops.context_attention import usp_attention
from hunyuan_fast.planning import traffic
from tests.distributed.attention_cases import Sequence, rows_of
from tests.kit.links import slow_link
from tests.kit.ranks import RankPool

# the module, whose name in hunyuan_fast.ops is that of the function
room = import_module("hunyuan_fast.ops.ring_attention")
Sent = dict[str, tuple[int, int]]  # bytes and messages by kind
SEQUENCE = Sequence(13, 6, (6, 0), heads=5)
LAYOUTS: dict[str, dict[str, Any]] = {
    "ring of 2": {"cp": 2},
    "ring of 3": {"cp": 3},
    "ring of 4": {"cp": 4},
    "ulysses of 3": {"cp": 3, "ulysses": 3},
    "usp of 2 x 2": {"cp": 4, "ulysses": 2},
}


def counted(layout: dict[str, Any], dtype: torch.dtype) -> tuple[Sent, Sent]:
    """What a rank sends, forward and backward."""
    mesh = build_mesh(Layout(**layout), "cpu")
    rank, shards = mesh["cp"].get_local_rank(), shards_of(layout)
    *heads, dout = (x[:, rows_of(shards, rank)] for x in SEQUENCE.draw(dtype))
    q, k, v = (x.clone().requires_grad_() for x in heads)
    groups: dict[str, Any] = {name: group_of(mesh, name) for name in ("ulysses", "ring")}
    kv_len = shards.kv_len(SEQUENCE.text_len)
    found = []
    with count_traffic() as forward:
        out = usp_attention(q, k, v, shards=shards, kv_len=kv_len, **groups)
    with count_traffic() as backward:
        out.backward(dout)
    for sent in (forward, backward):
        found.append({kind: (n, sent.messages[kind]) for kind, n in sent.bytes.items()})
    return found[0], found[1]


def shards_of(layout: dict[str, Any]) -> TokenShards:
    return TokenShards.split(SEQUENCE.video, SEQUENCE.text, layout["cp"])


def predicted(layout: dict[str, Any], rank: int, dtype: torch.dtype) -> tuple[Sent, Sent]:
    """What plans count with."""
    together = layout.get("ulysses", 1)
    rings, shards = layout["cp"] // together, shards_of(layout)
    ring, inside = divmod(rank, together)
    heads = split_sizes(SEQUENCE.heads, together)[inside]
    batch, dim, size = len(SEQUENCE.text_lens), SEQUENCE.head_dim, dtype.itemsize
    found: tuple[Sent, Sent] = ({}, {})
    for backward, sent in enumerate(found):
        if together > 1:
            rows = shards.rows[ring * together : (ring + 1) * together]
            numbers = batch, rows, SEQUENCE.heads, dim, size, together, bool(backward)
            calls = traffic.ulysses_messages(together)
            sent["all_to_all"] = traffic.ulysses_bytes(*numbers, rank=inside), calls
        if rings > 1:
            rows = shards.merged(together).rows
            numbers = batch, rows, heads, dim, size, rings, bool(backward)
            calls = traffic.ring_attention_messages(rings, bool(backward))
            sent["ring"] = traffic.ring_attention_bytes(*numbers, rank=ring), calls
    return found


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_traffic(ranks: RankPool, layout: str, dtype: torch.dtype) -> None:
    options = LAYOUTS[layout]
    for rank, found in enumerate(ranks.run(options["cp"], counted, options, dtype)):
        assert found == predicted(options, rank, dtype)


COMPUTE, TRANSFER = 0.04, 0.025


def step(compute: float, transfer: float, backward: bool) -> tuple[float, float]:
    """Seconds of a step and of its waiting, where every hop and every message take so long."""
    shape = (1, 32, 2, 16)
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    rows = {"lengths": (32,) * group.WORLD.size(), "group": group.WORLD}

    def slow(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            time.sleep(compute)
            return function(*args, **options)

        return call

    real = room.attention, room.attention_backward
    out = room.ring_attention(q, k, v, **rows)
    torch.distributed.barrier()
    room.attention, room.attention_backward = (slow(f) for f in real)
    try:
        with slow_link(transfer / 2, 2 * k.nbytes / (transfer / 2)) as link:
            start = time.perf_counter()
            if backward:
                out.backward(torch.ones_like(out))
            else:
                room.ring_attention(q, k, v, **rows)
            return time.perf_counter() - start, link.exposed
    finally:
        room.attention, room.attention_backward = real


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_communication_is_hidden_behind_compute(ranks: RankPool, backward: bool) -> None:
    """Below 15 % of a step when a hop computes for longer than its messages take."""
    hops = 4
    # in the backward pass gradients go beside keys and values
    messages = 2 if backward else 1
    shares = []
    for _ in range(3):  # somebody else may have the processor for a moment
        found = ranks.run(hops, step, messages * COMPUTE, TRANSFER, backward)
        shares.append(max(exposed / total for total, exposed in found))
        if shares[-1] < 0.15:
            return
    raise AssertionError(f"waiting took {shares} of a step")


def test_communication_that_cannot_be_hidden_is_seen(ranks: RankPool) -> None:
    for total, exposed in ranks.run(3, step, 0.0, TRANSFER, False):
        assert exposed > 0.5 * total and total >= 2 * TRANSFER


def of_own_lengths() -> tuple[Tensor, Tensor]:
    """A ring whose processes tell each other how many rows they have, and how many are valid."""
    rank = group.WORLD.rank()
    q, k, v = (torch.randn(2, 3 + rank, 2, 4) for _ in range(3))
    kv_len = torch.tensor([rank, 2])
    lengths = [3 + other for other in range(group.WORLD.size())]
    told = torch.tensor([[other, 2] for other in range(group.WORLD.size())])
    found = room.ring_attention(q, k, v, kv_len=kv_len, group=group.WORLD)
    wanted = room.ring_attention(q, k, v, kv_len=told, lengths=lengths, group=group.WORLD)
    return found, wanted


def test_lengths_are_told(ranks: RankPool) -> None:
    for found, wanted in ranks.run(3, of_own_lengths):
        assert torch.equal(found, wanted)


def of_compiled() -> list[Tensor]:
    """Compiled as one graph, and as it is: the output and the gradients."""
    rank, ranks = group.WORLD.rank(), group.WORLD.size()
    lengths, heads = (5, 3)[:ranks], [torch.randn(2, (5, 3)[rank], 2, 4) for _ in range(3)]
    kv_len = torch.tensor([[4, 5], [3, 0]], dtype=torch.int32)[:ranks]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = room.ring_attention(q, k, v, kv_len=kv_len, lengths=lengths, group=group.WORLD)
        return 2 * out

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in heads]
        out = function(*leaves)
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    return results


@pytest.mark.parametrize("ranks_of", (1, 2))
def test_compiled_without_a_break(ranks: RankPool, ranks_of: int) -> None:
    for results in ranks.run(ranks_of, of_compiled):
        for plain, compiled in zip(results[:4], results[4:], strict=True):
            assert torch.equal(plain, compiled)


def refused(kind: str) -> str:
    """What a ring says about arguments that do not fit."""
    q = torch.zeros(2, 3, 2, 4)
    ranks = group.WORLD.size()
    options: dict[str, Any] = {
        "lengths": {"lengths": (3,)},
        "own": {"lengths": (4, 4)},
        "kv_len": {"kv_len": torch.zeros(ranks + 1, 2, dtype=torch.int32), "lengths": (3, 3)},
        "long": {"kv_len": torch.full((ranks, 2), 4), "lengths": (3, 3)},
    }[kind]
    try:
        room.ring_attention(q, q, q, group=group.WORLD, **options)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lengths", "lengths must be 2 numbers, one for each rank"),
        ("own", "lengths must say 3 for rank"),
        ("kv_len", "kv_len must be (ranks, B) = (2, 2), got shape (3, 2)"),
        ("long", "kv_len must lie in [0, L] = [0, 3]"),
    ],
)
def test_refusals(ranks: RankPool, kind: str, words: str) -> None:
    assert all(words in message for message in ranks.run(2, refused, kind))


WRONG = {
    "long": ([[5, 0], [2, 2]], "kv_len must lie in [0, 4] for process 0, the rows that shards has"),
    "negative": ([[4, 4], [2, -1]], "[0, 3] for process 1, the rows that shards has for it, got"),
    # of lengths that are possible, in sum and for each process
    "video": ([[4, 4], [1, 3]], "for 5 valid tokens of sample 0 (3, 2) on processes 0 to 1, got"),
    "text": ([[4, 3], [3, 3]], "for 6 valid tokens of sample 1 (4, 2) on processes 0 to 1, got"),
}


def refused_lengths(kind: str, together: bool) -> str:
    """What each process says of lengths that are wrong for one of them."""
    shards = TokenShards((3, 2), (1, 1))
    q = torch.zeros(2, shards.rows[group.WORLD.rank()], 2, 4)
    groups = {"ulysses": group.WORLD, "ring": None}
    if not together:
        groups = {"ulysses": None, "ring": group.WORLD}
    try:
        kv_len = torch.tensor(WRONG[kind][0])
        usp_attention(q, q, q, shards=shards, kv_len=kv_len, **groups)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("kind", WRONG)
def test_every_process_says_what_is_wrong_with_lengths(ranks: RankPool, kind: str) -> None:
    said = ranks.run(2, refused_lengths, kind, True)
    assert said[0] == said[1] and WRONG[kind][1] in said[0]
    apart = ranks.run(2, refused_lengths, kind, False)
    # in a ring each process has video and text of its own
    assert apart == (["taken"] * 2 if kind in ("video", "text") else said)


def test_lengths_of_other_processes_than_there_are() -> None:
    """By itself a process has the rows of one, and takes no others for them."""
    q = torch.zeros(2, 3, 2, 4)
    shards = TokenShards((2,), (1,))

    def ring(kv_len: Tensor) -> object:
        return room.ring_attention(q, q, q, kv_len=kv_len, group=None)

    def usp(kv_len: Tensor) -> object:
        return usp_attention(q, q, q, shards=shards, kv_len=kv_len, ulysses=None, ring=None)

    for call in (ring, usp):
        with pytest.raises(
            ValueError, match=r"kv_len must be \(ranks, B\) = \(1, 2\), got .*\(3, 2"
        ):
            call(torch.zeros(3, 2, dtype=torch.int32))
        with pytest.raises(TypeError, match=r"kv_len must be int32 or int64, got torch\.float32"):
            call(torch.full((1, 2), 1.5))
        call(torch.ones(1, 2, dtype=torch.int32))
