"""Checkpoints know nothing of layouts: saved on some ranks, loaded on others, the same bits."""

import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed import group

from hunyuan_fast.distributed.collectives import size_of
from hunyuan_fast.distributed.mesh import Layout, build_mesh
from hunyuan_fast.distributed.wholes import Wholes, local_of
from hunyuan_fast.models import HunyuanVideoTransformer
from hunyuan_fast.models.dit.fully_sharded import shard_states
from hunyuan_fast.models.dit.resharding import Resharding, load_pretrained, save_pretrained
from hunyuan_fast.models.dit.tensor_parallel import parallelize_tensors
from hunyuan_fast.models.weights import CheckpointError, folder, sources
from hunyuan_fast.modules.fp8 import quantize_linears
from tests.distributed.tensor_parallel_cases import inputs_of, transformer
from tests.kit.ranks import RankPool
from tests.models.weights.cases import bits, write_official_transformer

SHARDS = 40_000  # bytes: several files
CASE: dict[str, Any] = {"size": (1, 2, 14), "text_lengths": (3,), "text_length": 3}
WRITERS = ({"tp": 4}, {"tp": 2, "dp": 2}, {"dp": 2, "tp": 2, "zero": 3})
READERS = (({"tp": 2}, True), ({"tp": 4}, False), ({"tp": 3}, False))


def saved(
    sizes: dict[str, int], path: str, layout: Any = "native", fp8: bool = False
) -> tuple[int, int]:
    """Save a model from a layout, without waiting for the disk.

    Returns how many tensors were gathered, and how many of them were in memory at a time.
    """
    model, mesh = transformer(), build_mesh(Layout(**sizes), "cpu")
    if fp8:
        quantize_linears(model)
    if sizes.get("tp", 1) > 1:
        parallelize_tensors(model, mesh)
    if sizes.get("zero"):
        shard_states(model, mesh, Layout(**sizes))
    own = {local_of(x).untyped_storage()._cdata for x in model.state_dict().values()}
    gather, gathered, most = Wholes.gather, [], 0
    allowed = 2 if fp8 else 1  # a scale is held beside what it scales

    def alive() -> int:
        """A thread of gloo may let go of what it has gathered a little later."""
        end = time.monotonic() + 2
        while (found := sum(storage() is not None for storage in gathered)) > allowed:
            if time.monotonic() > end:
                break
            time.sleep(1e-3)
        return found

    def counted(wholes: Wholes, name: str, x: Tensor) -> Tensor:
        nonlocal most
        whole = gather(wholes, name, x)
        if whole.untyped_storage()._cdata not in own:
            gathered.append(weakref.ref(whole.untyped_storage()))
        most = max(most, alive())
        return whole

    with mock.patch.object(folder, "_sync"), mock.patch.object(Wholes, "gather", counted):
        save_pretrained(model, mesh, path, layout=layout, max_shard_bytes=SHARDS)
    return len(gathered), most


def loaded(sizes: dict[str, int], path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Differences of what a layout loads from its part of what one process does, and bytes read."""
    mesh = build_mesh(Layout(**sizes), "cpu")
    read = []

    def count(stored: Any, region: Any) -> Tensor:
        read.append(read_region(stored, region))
        return read[-1]

    read_region = sources._read_region
    with mock.patch.object(sources, "_read_region", count):
        model = load_pretrained(path, mesh, **options)
    wanted = HunyuanVideoTransformer.from_pretrained(path, **options)
    parallelize_tensors(wanted, mesh)
    state, expected = model.state_dict(), wanted.state_dict()
    assert list(state) == list(expected) and not model.training
    with torch.no_grad():
        inputs = inputs_of(CASE, torch.float32)
        moved = not torch.equal(model(**inputs), wanted(**inputs))
    names = [name for name, x in expected.items() if not same(x, state[name])]
    held = sum(state[name].nbytes for name in model.cuts)
    return {"wrong": names, "moved": moved, "read": sum(x.nbytes for x in read), "held": held}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def there_and_back(ranks: int) -> list[str]:
    """Parameters, and tensors of their shapes, whose way to the whole and back changes a bit."""
    whole, model = transformer().state_dict(), transformer()
    parallelize_tensors(model, build_mesh(Layout(tp=ranks), "cpu"))
    resharding = Resharding(model)
    wrong = []
    for name, parameter in model.named_parameters():
        joined = resharding.to_canonical(name, parameter)
        again = resharding.from_canonical(name, whole[name])
        moment = resharding.to_canonical(name, parameter.bfloat16() ** 2)
        good = same(joined, whole[name]) and same(again, parameter.detach())
        if not (good and same(moment, whole[name].bfloat16() ** 2)):
            wrong.append(name)
    return wrong


def fail_to_save(path: str) -> None:
    mesh = build_mesh(Layout(tp=size_of(group.WORLD)), "cpu")
    model = transformer()
    parallelize_tensors(model, mesh)
    with pytest.raises(CheckpointError, match=r"not empty|the first process could not write"):
        save_pretrained(model, mesh, path)


def refuse_to_save() -> None:
    model = transformer()
    parallelize_tensors(model, build_mesh(Layout(tp=2), "cpu"))
    with pytest.raises(ValueError, match="must hold all of its weights to be saved"):
        model.save_pretrained("nowhere")


def refuse_to_map() -> None:
    model = transformer()
    whole = model.state_dict()
    parallelize_tensors(model, build_mesh(Layout(tp=2), "cpu"))
    resharding, name = Resharding(model), "double_blocks.0.img_attn_qkv.weight"
    with pytest.raises(ValueError, match=f"{name} must have 144 rows along dim 0, got .288, 96"):
        resharding.to_canonical(name, whole[name])
    with pytest.raises(ValueError, match=f"{name} must have 288 rows along dim 0, got .144, 96"):
        resharding.from_canonical(name, model.state_dict()[name])


def run_loaded(
    ranks: RankPool, sizes: dict[str, int], path: Path, **options: Any
) -> list[dict[str, Any]]:
    return ranks.run(Layout(**sizes).world_size, loaded, sizes, str(path), options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a single process saves."""
    monkeypatch.setattr(folder, "_sync", lambda path: None)
    transformer().save_pretrained(tmp_path / "alone", max_shard_bytes=SHARDS)
    return tmp_path / "alone"


@pytest.mark.parametrize("sizes", WRITERS, ids=str)
def test_what_is_saved_knows_no_layout(
    ranks: RankPool, alone: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    found = ranks.run(Layout(**sizes).world_size, saved, sizes, str(tmp_path / "many"))
    assert len(contents(alone)) > 4
    assert contents(tmp_path / "many") == contents(alone)
    parted = "zero" in sizes
    for rank, (gathered, most) in enumerate(found):
        # the second copy of what lies on each process whole has nothing to do
        takes_part = parted or rank < sizes["tp"]
        assert (gathered > 10, most) == (takes_part, int(takes_part))


@pytest.mark.parametrize(("sizes", "verify"), READERS, ids=str)
def test_any_layout_loads_it(
    ranks: RankPool, alone: Path, sizes: dict[str, int], verify: bool
) -> None:
    for found in run_loaded(ranks, sizes, alone, verify=verify):
        assert not found["wrong"] and not found["moved"]
        assert found["read"] == (0 if verify else found["held"])


def test_other_layouts_of_files(ranks: RankPool, tmp_path: Path) -> None:
    model = transformer()
    model.save_pretrained(tmp_path / "alone", layout="diffusers", max_shard_bytes=SHARDS)
    ranks.run(2, saved, {"tp": 2}, str(tmp_path / "many"), "diffusers")
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")
    for found in run_loaded(ranks, {"tp": 3}, tmp_path / "many"):
        assert not found["wrong"] and not found["moved"]
        assert found["read"] == found["held"], "no digests, so only slices are read"


def test_a_torch_file(ranks: RankPool, tmp_path: Path) -> None:
    file = write_official_transformer(transformer(), tmp_path)
    for found in run_loaded(ranks, {"tp": 3}, file, config=transformer().config):
        assert not found["wrong"] and not found["moved"]


def test_weights_of_eight_bits(ranks: RankPool, tmp_path: Path) -> None:
    model = transformer()
    quantize_linears(model)
    model.save_pretrained(tmp_path / "alone", max_shard_bytes=SHARDS)
    ranks.run(3, saved, {"tp": 3}, str(tmp_path / "many"), "native", True)
    assert contents(tmp_path / "many") == contents(tmp_path / "alone")
    for options in ({"verify": False}, {"keep_fp8": False, "dtype": torch.float32}):
        for found in run_loaded(ranks, {"tp": 2}, tmp_path / "many", **options):
            assert not found["wrong"] and not found["moved"]
            assert found["read"] == (0 if "dtype" in options else found["held"])


@pytest.mark.parametrize("ranks_of", (2, 3, 4))
def test_there_and_back(ranks: RankPool, ranks_of: int) -> None:
    assert ranks.run(ranks_of, there_and_back, ranks_of) == [[]] * ranks_of


def test_nobody_waits_for_a_failure(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "foreign.txt").write_text("of somebody else")
    ranks.run(2, fail_to_save, str(tmp_path), timeout=20)


def test_a_part_is_not_saved_as_the_whole(ranks: RankPool) -> None:
    ranks.run(2, refuse_to_save)


def test_one_process_has_nothing_to_map() -> None:
    model = transformer()
    resharding = Resharding(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(resharding.to_canonical(name, parameter), parameter)
        assert torch.equal(resharding.from_canonical(name, parameter), parameter)


def test_what_does_not_fit(ranks: RankPool) -> None:
    ranks.run(2, refuse_to_map)
