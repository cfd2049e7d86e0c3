"""``hunyuan-fast bench attention``: what it prints, keeps, forgets and refuses."""

from pathlib import Path

import pytest

from hunyuan_fast import dispatch, ranking

SMALL = ("attention", "--shapes", "1x64x2x128", "2x40x2x8:40,7", "--seconds", "0.01")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HUNYUAN_FAST_CACHE", str(tmp_path / "cache"))
    dispatch.forget_rankings()
    yield ranking.user_file()
    dispatch.forget_rankings()


def test_a_table_of_all_candidates(cli, cache: Path) -> None:
    done = cli("bench", *SMALL, "--backward", "--dtype", "bfloat16")
    assert done.status == 0
    for shape in ("1x64x2x128", "2x40x2x8:40,7"):
        for what in ("forward", "forward+backward"):
            assert f"{shape} bfloat16 {what}\n" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert sum(row[:1] == ["reference"] for row in rows) == 4
    assert sum(row[-2:-1] == ["100%"] for row in rows) == 4
    assert "library_impl.flash_attn_3: flash-attn-3 is not installed" in done.out
    assert not cache.exists()


def test_tune_keeps_doctor_tells_forget_removes(cli, cache: Path) -> None:
    done = cli("bench", *SMALL, "--dtype", "bfloat16", "--tune")
    assert done.status == 0 and f"kept in {cache}" in done.out
    (section,) = ranking.load(cache)
    assert section.arch == "cpu" and len(section.entries) == 2
    told = cli("doctor").out
    assert f"measured here on {section.date}" in told
    (entry,) = (e for e in section.entries if e.shape_class[1] == 128)
    rows = [line.split() for line in told.splitlines()]
    assert ["rope3d_attention", "cpu", entry.ranked()[0]] in [row[:3] for row in rows]
    assert cli("bench", "attention", "--forget").out == f"removed {cache}\n"
    assert not cache.exists()
    assert "nothing is kept" in cli("bench", "attention", "--forget").out


def test_doctor_tells_of_a_ranking_that_is_ignored(cli, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("{")
    done = cli("doctor")
    assert done.status == 0 and f"{cache} is no ranking" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["video"], "no benchmark 'video'; expected one of attention"),
        (["attention", "--shapes", "1x2"], "--shapes: a shape must be BxLxNxD"),
        (["attention", "--without", "flash"], "--without must be one of "),
        (["attention", "--seconds", "0"], "--seconds must be above 0"),
        (["attention", "--dtype", "int8"], "--dtype must be"),
        (["attention", "--device", "tpu"], "--device must be"),
    ],
)
def test_what_can_never_be_is_refused(cli, cache: Path, words: list[str], said: str) -> None:
    done = cli("bench", *words)
    assert done.status == 2 and said in done.error


def test_a_place_that_cannot_be_written_is_told(cli, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    done = cli("bench", "attention", "--shapes", "1x9x1x8", "--seconds", "0.01", "--tune")
    assert done.status == 1 and "HUNYUAN_FAST_CACHE" in done.error


def test_bench_alone_tells_what_there_is(cli) -> None:
    done = cli("bench")
    assert done.status == 0 and "usage: hunyuan-fast bench {attention}" in done.out
