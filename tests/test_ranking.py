"""Measured rankings: who answers because of them, whose they are, and what breaks none of it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hunyuan_fast import dispatch, kernels, ranking
from hunyuan_fast.kernels.rope3d_attention.shape_class import neighbours, shape_class
from hunyuan_fast.ops.rope3d_attention import attention
from hunyuan_fast.ranking import Entry, RankingError, Section

ROOM = "rope3d_attention"
IMPLEMENTATION = '''"""{name}."""
VERIFIED_ON = frozenset({verified})
def supports(x):
    return "x must be short" if x.numel() > {longest} else None
def forward(x):
    return "{name}"
def backward(x):
    return "{name}"
'''
SHAPE_CLASS = '''"""Calls are alike when they have as many digits."""
def shape_class(x):
    return x.dtype, len(str(x.numel()))
def neighbours(measured):
    return [(measured[0], measured[1] + step) for step in (-1, 1)]
'''
F32 = torch.float32


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The user's file, in a folder of its own."""
    monkeypatch.setenv("HUNYUAN_FAST_CACHE", str(tmp_path / "cache"))
    dispatch.forget_rankings()
    yield ranking.user_file()
    dispatch.forget_rankings()


@pytest.fixture
def op(tmp_path, monkeypatch, cache) -> str:
    """A room with four candidates, of which one is verified nowhere."""
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    monkeypatch.setattr(dispatch, "_named", {})
    caches = [getattr(dispatch, n) for n in ("ops", "implementations", "choices", "_libraries")]
    caches += [getattr(dispatch, n) for n in ("_candidates", "_verified", "_ranked")]
    folder = tmp_path / f"made_{tmp_path.name.replace('-', '_')}"
    (folder / "libraries").mkdir(parents=True)
    for path, facts in {
        "library_impl": ("{'cpu'}", 99999),
        "libraries/quick": ("{'cpu'}", 9999),
        "libraries/quickest": ("{'cpu'}", 99),
        "libraries/unproven": ("()", 99999),
        "reference": ("{'*'}", 99999),
    }.items():
        name = path.rsplit("/", 1)[-1]
        text = IMPLEMENTATION.format(name=name, verified=facts[0], longest=facts[1])
        (folder / f"{path}.py").write_text(text)
    (folder / "__init__.py").write_text('"""A room."""\n')
    (folder / "libraries/__init__.py").write_text('"""Libraries."""\n')
    (folder / "shape_class.py").write_text(SHAPE_CLASS)
    importlib.invalidate_caches()
    for each in caches:
        each.cache_clear()
    yield folder.name
    for name in [name for name in sys.modules if folder.name in name]:
        del sys.modules[name]
    monkeypatch.undo()
    for each in caches:
        each.cache_clear()


def entry(shape_class: tuple, **ms: float) -> Entry:
    ms = {name if name == "reference" else f"library_impl.{name}": t for name, t in ms.items()}
    return Entry(shape_class, "a call", ms, dict.fromkeys(ms, 0.5), {})


def section(op: str, *entries: Entry, arch: str = "cpu", date: str = "2026-01-02") -> Section:
    device = ranking.device_name(torch.device("cpu"))
    return Section(op, arch, device, ranking.software(op), date, list(entries))


def keep(path: Path, *sections: Section) -> None:
    ranking.save(sections, path)
    dispatch.forget_rankings()


def answering(op: str, numel: int) -> str:
    x = torch.zeros(numel)
    chosen = dispatch.select(op, x)
    found = dispatch.explain(op, x)
    assert next(name for name, why in found.items() if why is None) == dispatch.name_of(chosen)
    return chosen.forward(x)


ALL = {"quick": 2.0, "quickest": 1.0, "unproven": 0.5, "reference": 9.0}


def test_without_a_ranking_the_order_decides(op):
    assert answering(op, 500) == "library_impl"
    assert list(dispatch.choices(op)) == [
        *("library_impl.quick", "library_impl.quickest", "library_impl.unproven", "reference")
    ]


def test_the_fastest_verified_one_that_can_answers(op):
    keep(ranking.committed_file(op), section(op, entry((F32, 2), **ALL), entry((F32, 3), **ALL)))
    assert answering(op, 50) == "quickest"
    assert answering(op, 500) == "quick"
    found = dispatch.explain(op, torch.zeros(500))
    assert found["library_impl.quick"] is None
    assert list(found).index("library_impl.quick") < list(found).index("library_impl")
    with dispatch.use("reference", op):
        assert dispatch.select(op, torch.zeros(500)).forward(0) == "reference"


def test_the_report_has_room_for_the_name_of_a_library():
    reasons = {"cuda_impl": "unverified", "library_impl.flash_attn_3": None, "reference": None}
    report = dispatch.Report({("scale", "sm_90"): reasons}, notes=("measured here",))
    _, row, note = str(report).splitlines()
    assert row.split() == [
        "scale",
        "sm_90",
        "library_impl.flash_attn_3",
        "cuda_impl:",
        "unverified",
    ]
    assert note == "measured here"


def test_a_committed_ranking_holds_for_its_architecture(op):
    keep(ranking.committed_file(op), section(op, entry((F32, 3), **ALL), arch="sm_90"))
    assert answering(op, 500) == "library_impl"


def test_who_is_slow_answers_before_who_was_not_measured(op):
    keep(ranking.committed_file(op), section(op, entry((F32, 3), reference=3.0)))
    assert answering(op, 500) == "reference"
    assert dispatch.explain(op, torch.zeros(500))["library_impl"] == (
        "reference is faster for this call"
    )


def test_the_users_own_measurement_verifies_and_comes_first(op, cache):
    keep(ranking.committed_file(op), section(op, entry((F32, 3), **ALL), entry((F32, 5), **ALL)))
    keep(cache, section(op, entry((F32, 3), unproven=1.0, quick=2.0)))
    assert answering(op, 500) == "unproven"
    assert answering(op, 5000) == "unproven"  # near enough
    assert answering(op, 50000) == "reference"  # measured by the committed one alone


def test_a_class_goes_to_the_nearest_measurement(op, cache):
    """Between two to the longer one, as ``neighbours`` has it."""
    keep(cache, section(op, entry((F32, 1), quick=1.0), entry((F32, 3), reference=1.0)))
    expected = {5: "quick", 50: "reference", 500: "reference", 5000: "reference"}
    assert {n: answering(op, n) for n in expected} == expected
    assert answering(op, 50000) == "library_impl"


@pytest.mark.parametrize("changed", ["torch", "kernels", "hunyuan-fast", "cudnn", "flash-attn"])
def test_other_software_makes_it_worthless(op, cache, changed, caplog):
    made = section(op, entry((F32, 3), quick=1.0))
    keep(cache, replace(made, software=made.software | {changed: "another"}))
    with caplog.at_level(logging.WARNING, logger="hunyuan_fast"):
        assert answering(op, 500) == "library_impl"
        assert answering(op, 501) == "library_impl"
    assert len(caplog.records) == 1
    assert f"measured on 2026-01-02 is ignored, because {changed} changed" in caplog.text


def test_another_kernel_is_another_software(op):
    before = ranking.software(op)["kernels"]
    path = ranking.committed_file(op).with_name("reference.py")
    path.write_text(path.read_text() + "# faster\n")
    after = ranking.software(op)["kernels"]
    assert after != before
    text = path.read_text().replace("frozenset({'*'})", "frozenset({'*', 'sm_90'})")
    path.write_text(text)
    assert ranking.software(op)["kernels"] == after  # who is verified changes no kernel


def test_another_device_has_a_ranking_of_its_own(op, cache, caplog):
    keep(cache, replace(section(op, entry((F32, 3), quick=1.0)), device="Another CPU, 2 cores"))
    assert answering(op, 500) == "library_impl"
    assert not caplog.records


def test_a_candidate_that_is_gone_is_passed_over(op, cache):
    keep(cache, section(op, entry((F32, 3), vanished=1.0, quick=2.0)))
    assert answering(op, 500) == "quick"


BROKEN = {
    "empty": "",
    "cut off": '{"version": 1, "sections": [{"op": ',
    "a list": "[]",
    "another version": '{"version": 2, "sections": []}',
    "no sections": '{"version": 1}',
    "a number for a section": '{"version": 1, "sections": [3]}',
    "bytes": b"\xff\xfe\x00",
}
SPOILED = {
    "a word for a time": lambda e: e["ms"].update({"reference": "fast"}),
    "a time of zero": lambda e: e["ms"].update({"reference": 0.0}),
    "not a number": lambda e: e["ms"].update({"reference": float("nan")}),
    "no class": lambda e: e.pop("shape_class"),
    "a class of unknown dtype": lambda e: e.update(shape_class=["float33", 3]),
    "a class of a function": lambda e: e.update(shape_class=["zeros", 3]),
    "a class with a list in it": lambda e: e.update(shape_class=["float32", [3]]),
    "times in a list": lambda e: e.update(ms=[1.0]),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_told_and_ignored(text, op, cache, caplog):
    cache.parent.mkdir()
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, logger="hunyuan_fast"):
        assert answering(op, 500) == "library_impl"
    assert str(cache) in caplog.text and "--forget" in caplog.text


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_file_with_anything_else_in_it_is_no_ranking(spoil, op, cache):
    keep(cache, section(op, entry((F32, 3), reference=1.0)))
    data = json.loads(cache.read_text())
    spoil(data["sections"][0]["entries"][0])
    cache.write_text(json.dumps(data))
    with pytest.raises(RankingError, match=r"ranking\.json is no ranking: "):
        ranking.load(cache)


def test_what_is_written_is_read(op, cache):
    made = section(op, entry((F32, 3), quick=1.25), entry((torch.bfloat16, 3, True), quick=2.5))
    keep(cache, made)
    assert ranking.load(cache) == [made]
    assert [path.name for path in cache.parent.iterdir()] == ["ranking.json"]


def test_a_file_is_written_whole_or_not_at_all(op, cache, monkeypatch):
    made = section(op, entry((F32, 3), quick=1.25))
    keep(cache, made)

    def fail(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        ranking.save([], cache)
    assert ranking.load(cache) == [made]
    assert [path.name for path in cache.parent.iterdir()] == ["ranking.json"]


def test_a_new_measurement_keeps_what_it_did_not_measure(op):
    old = section(op, entry((F32, 2), quick=1.0), entry((F32, 3), quick=1.0))
    new = section(op, entry((F32, 3), reference=1.0), date="2026-02-02")
    other = replace(old, device="Another CPU")
    _, made = ranking.merged(new, [old, other])
    assert [e.shape_class for e in made.entries] == [(F32, 2), (F32, 3)]
    assert made.entries[1].ranked() == ["reference"] and made.date == "2026-02-02"
    stale = replace(old, software={"torch": "1"})
    assert ranking.merged(new, [stale, other]) == [other, new]


def test_where_the_users_file_is(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for given, expected in {
        ("", ""): tmp_path / ".cache/hunyuan-fast/ranking.json",
        ("", "relative"): tmp_path / ".cache/hunyuan-fast/ranking.json",
        ("", "/somewhere"): Path("/somewhere/hunyuan-fast/ranking.json"),
        ("/mine", "/somewhere"): Path("/mine/ranking.json"),
    }.items():
        monkeypatch.setenv("HUNYUAN_FAST_CACHE", given[0])
        monkeypatch.setenv("XDG_CACHE_HOME", given[1])
        assert ranking.user_file() == expected


def spy(impl: ModuleType, calls: list[str]) -> ModuleType:
    """An implementation of attention that tells when it is called."""
    made = ModuleType(impl.__name__)
    made.supports = impl.supports

    def telling(name: str):
        def told(*args):
            calls.append(f"{dispatch.name_of(impl)} {name}")
            return getattr(impl, name)(*args)

        return told

    made.forward, made.backward = telling("forward"), telling("backward")
    return made


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Calls of attention where the reference is ranked first for training, a library else."""
    found: list[str] = []
    spies = {n: spy(impl, found) for n, impl in dispatch.choices(ROOM).items()}
    table = {
        (F32, 8, octave, padded, training): [spies["reference" if training else CPU_FLASH]]
        for octave in range(9)
        for padded in (False, True)
        for training in (False, True)
    }
    monkeypatch.setattr(dispatch, "_ranked", lambda op, arch: (shape_class, table))
    return found


CPU_FLASH = "library_impl.cpu_flash"


@pytest.mark.parametrize("watched", [False, True], ids=["short way", "operator"])
@pytest.mark.parametrize("wanting", [0, 1, 2])
def test_forward_and_backward_of_a_call_have_one_answer(calls, watched, wanting):
    tensors = [torch.randn(1, 20, 2, 8) for _ in range(3)]
    tensors[wanting].requires_grad_()
    if watched:
        with torch.autograd.profiler.profile():
            attention(*(2 * x for x in tensors)).sum().backward()
    else:
        attention(*(2 * x for x in tensors)).sum().backward()
    assert calls == ["reference forward", "reference backward"]
    calls.clear()
    with torch.no_grad():
        attention(*(2 * x for x in tensors))
    assert calls == [f"{CPU_FLASH} forward"]


def test_a_ranked_call_compiles_in_one_piece(calls):
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    result = compiled(q, k, v)
    assert calls == [f"{CPU_FLASH} forward"]
    torch.testing.assert_close(result, attention(q, k, v))
    calls.clear()
    q.requires_grad_()
    compiled(q, k, v).sum().backward()
    # A compiler hides from the op who wants gradients; any pair of passes is right.
    assert [call.split()[1] for call in calls] == ["forward", "backward"]


def test_classes_of_attention():
    q = torch.zeros(2, 5000, 3, 64)
    lengths = torch.tensor([3, 4])
    found = shape_class(q, q, q, lengths, 1.0)
    assert found == (F32, 64, 13, True, False)
    assert shape_class(q, q.clone().requires_grad_(), q, None, 1.0) == (F32, 64, 13, False, True)
    near = list(neighbours(found))
    assert [each[2] for each in near] == [12, 14, 11, 15]
    assert all(each[:2] == found[:2] and each[3:] == found[3:] for each in near)


@pytest.mark.parametrize("op", [op for op in dispatch.ops() if ranking.is_ranked(op)])
def test_a_committed_ranking_is_sound(op):
    """It reads, names candidates that there are, and classes of the room."""
    for each in ranking.load(ranking.committed_file(op)):
        assert each.op == op and each.date and each.entries
        for measured in each.entries:
            assert measured.ms and measured.ms.keys() <= measured.error.keys()
            assert all(measured.error[name] <= 1 for name in measured.ms)
