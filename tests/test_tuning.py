"""Measuring candidates: who is right, who is timed, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hunyuan_fast import dispatch, ranking, tuning
from hunyuan_fast.kernels.rope3d_attention import reference
from hunyuan_fast.kernels.rope3d_attention.libraries import cpu_flash, cudnn
from hunyuan_fast.kernels.rope3d_attention.problems import Problem, problems, read_shape
from tests.ops import rope3d_attention_libraries as stand_ins

ROOM = "rope3d_attention"
CPU = torch.device("cpu")
BF16 = torch.bfloat16
PADDED = Problem(BF16, 2, 230, 3, 16, (230, 200), training=True)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HUNYUAN_FAST_CACHE", str(tmp_path))
    dispatch.forget_rankings()
    yield ranking.user_file()
    dispatch.forget_rankings()


def candidate(forward=reference.forward, backward=reference.backward, supports=lambda *_: None):
    return SimpleNamespace(forward=forward, backward=backward, supports=supports)


def measure(problem: Problem, monkeypatch, **candidates) -> ranking.Entry:
    monkeypatch.setattr(dispatch, "choices", lambda op: candidates)
    return tuning.measure(ROOM, problem, CPU, seconds=0.01)


def forward_of(change):
    """The reference's forward with another call, or another result."""

    def forward(q, k, v, kv_len, scale, out=None, q_len=None):
        return change(q, k, v, kv_len, scale, out, q_len)

    return forward


def scaled(factor):
    return candidate(forward_of(lambda *a: reference.forward(*a[:4], a[4] * factor, *a[5:])))


def results(change):
    """The reference with its results changed: out, lse -> out, lse."""
    return candidate(forward_of(lambda *a: change(*reference.forward(*a))))


def gradients(change):
    return candidate(backward=lambda *a: change(*reference.backward(*a)))


def one_row(x):
    x[0, 7] *= 1.1
    return x


def lengths(change):
    return candidate(
        forward_of(
            lambda q, k, v, kv_len, scale, *own: reference.forward(
                *(x.nan_to_num() for x in (q, k, v)),
                change(kv_len, k.shape[1]),
                scale,
                *own,
            )
        )
    )


WRONG = {
    "another scale": scaled(1.02),
    "padding seen": lengths(lambda n, _: None),
    "a key too many": lengths(lambda n, most: (n + 1).clamp(max=most)),
    "a key too few": lengths(lambda n, most: (n - 1).clamp(min=0)),
    "all queries of their own": candidate(
        forward_of(
            lambda q, k, v, *a: reference.forward(
                *(x.nan_to_num() for x in (q, k, v)),
                *a[:3],
                None if a[3] is None else torch.full_like(a[3], q.shape[1]),
            )
        )
    ),
    "padding not zero": results(lambda out, lse: (out.masked_fill(out == 0, 1e-3), lse)),
    "logarithms of 2": results(lambda out, lse: (out, lse * 1.4427)),
    "a finite log-sum-exp of nothing": results(lambda out, lse: (out, lse.nan_to_num(neginf=-9e9))),
    "one row": results(lambda out, lse: (one_row(out), lse)),
    "not a number": results(lambda out, lse: (out * torch.nan, lse)),
    "another dtype": results(lambda out, lse: (out.float(), lse)),
    "fewer digits": results(lambda out, lse: (out.to(torch.float8_e4m3fn).to(out.dtype), lse)),
    "dk for dv": gradients(lambda dq, dk, dv: (dq, dv, dk)),
    "dq without its scale": gradients(lambda dq, dk, dv: (dq * 4, dk, dv)),
    "gradients of padding": gradients(lambda dq, dk, dv: (dq, dk.masked_fill(dk == 0, 1.0), dv)),
    "one row of dv": gradients(lambda dq, dk, dv: (dq, dk, one_row(dv))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_who_is_wrong_is_not_timed(fault, monkeypatch):
    entry = measure(PADDED, monkeypatch, wrong=WRONG[fault], right=candidate())
    assert entry.ranked() == ["right"]
    assert entry.error["wrong"] > 1 >= entry.error["right"]
    assert entry.declined["wrong"].startswith("disagrees with the reference: ")


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("valid", [None, (230, 200)], ids=["whole", "padded"])
def test_who_is_right_agrees(dtype, valid, monkeypatch):
    problem = replace(PADDED, dtype=dtype, lengths=valid)
    entry = measure(problem, monkeypatch, flash=cpu_flash, plain=candidate())
    assert set(entry.ms) == {"flash", "plain"} and not entry.declined
    assert entry.shape_class == (dtype, 16, 8, valid is not None, True)


def test_kernels_that_round_probabilities_agree(monkeypatch):
    stand_ins.install(monkeypatch)
    for library in stand_ins.LIBRARIES:
        monkeypatch.setattr(library, "supports", lambda *_: None)
    declined = "no q_len"  # and tried on everything else
    monkeypatch.setattr(cudnn, "supports", lambda *args: declined if len(args) > 6 else None)
    found = {library.__name__: library for library in stand_ins.LIBRARIES}
    entry = measure(replace(PADDED, dtype=BF16), monkeypatch, **found)
    assert set(entry.ms) == set(found), entry.declined


def test_who_fails_is_told_and_the_others_go_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel image\nis available")

    entry = measure(
        replace(PADDED, training=False),
        monkeypatch,
        fails=candidate(forward=fail),
        refuses=candidate(supports=lambda *_: "head_dim must be 128"),
        right=candidate(),
    )
    assert entry.declined == {
        "fails": "RuntimeError: no kernel image",
        "refuses": "head_dim must be 128",
    }
    assert list(entry.ms) == ["right"]


def test_who_is_left_out_is_not_called(monkeypatch):
    monkeypatch.setattr(dispatch, "choices", lambda op: {"a": None, "b": candidate()})
    entry = tuning.measure(ROOM, PADDED, CPU, seconds=0.01, without=["a"])
    assert entry.declined == {"a": "left out"} and list(entry.ms) == ["b"]


def test_a_broken_device_ends_it(monkeypatch):
    monkeypatch.setattr(dispatch, "choices", lambda op: {"a": candidate()})

    def broken(device):
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.setattr(tuning, "_wait", broken)
    with pytest.raises(RuntimeError, match=r"a has broken cpu .*access.*--without a$"):
        tuning._check_device(CPU, "a")


def test_times_are_medians_of_turns():
    clock = iter(range(10**6))
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) or next(clock) for name in "abc"}
    found = tuning._times(runs, dict.fromkeys(runs, 0.01), CPU, 0.0)
    assert set(found) == set("abc") and all(t > 0 for t in found.values())
    assert turns == list("abcbcacab")


def test_who_is_far_behind_is_called_no_more():
    turns: list[str] = []
    runs = {name: lambda name=name: turns.append(name) for name in ("fast", "slow")}
    found = tuning._times(runs, {"fast": 0.01, "slow": 5.0}, CPU, 1e-9)
    assert found["slow"] == 5.0 and set(turns) == {"fast"}


def test_what_is_kept_answers(cache, monkeypatch, generator):
    q = torch.randn(1, 40, 2, 8, generator=generator)
    problem = Problem(torch.float32, 1, 40, 2, 8)
    entry = tuning.measure(ROOM, problem, CPU, seconds=0.01)
    assert {"library_impl.cpu_flash", "reference"} <= set(entry.ms)
    for quick, slow in ((reference, cpu_flash), (cpu_flash, reference)):
        names = dispatch.name_of(quick), dispatch.name_of(slow)
        tuning.keep(
            ROOM, "cpu", CPU, [replace(entry, ms=dict(zip(names, (1.0, 2.0), strict=True)))]
        )
        assert dispatch.select(ROOM, q, q, q, None, 0.3) is quick
    assert len(ranking.load(cache)[0].entries) == 1


@pytest.mark.gpu
@pytest.mark.whole_gpu
@pytest.mark.parametrize("valid", [None, (300, 0)], ids=["whole", "padded"])
def test_a_gpu_is_measured(valid):
    problem = Problem(BF16, 2, 300, 4, 64, valid, training=True)
    entry = tuning.measure(ROOM, problem, torch.device("cuda"), seconds=0.1)
    assert {"reference", "library_impl.flash"} <= set(entry.ms), entry.declined
    assert set(entry.ms) | set(entry.declined) == set(dispatch.choices(ROOM))


def test_a_broken_file_is_replaced(cache):
    cache.write_text("nonsense")
    entry = ranking.Entry((torch.float32, 8, 6, False, False), "a call", {"reference": 1.0}, {}, {})
    tuning.keep(ROOM, "cpu", CPU, [entry])
    assert ranking.load(cache)[0].entries == [entry]


def test_flops_count_pairs_of_valid_tokens():
    assert Problem(BF16, 2, 10, 3, 8).flops == 2 * 2 * 2 * 100 * 3 * 8
    assert Problem(BF16, 2, 10, 3, 8, (10, 4)).flops == 2 * 2 * 116 * 3 * 8
    assert Problem(BF16, 1, 10, 3, 8, None, True).flops == 7 * 2 * 100 * 3 * 8


def test_the_long_clips_are_measured_on_a_gpu():
    found = problems(torch.device("cuda"), [BF16], training=True)
    shapes = {(p.batch, p.length, p.num_heads, p.head_dim, p.lengths, p.training) for p in found}
    for length in (33024, 119056):
        for training in (False, True):
            assert (1, length, 24, 128, None, training) in shapes
    assert any(p.lengths and p.length == 33024 for p in found)
    assert len({p.shape_class for p in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1x2x3", "must be BxLxNxD"),
        ("1x2x3xD", "must be BxLxNxD"),
        ("1x0x3x8", "positive"),
        ("2x9x3x8:9", "for each of its 2"),
        ("1x9x3x8:10", "0 to 9"),
        ("1x9x3x8:", "must be BxLxNxD"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        read_shape(text)
    assert read_shape("2x9x3x8:9,0") == (2, 9, 3, 8, (9, 0))
