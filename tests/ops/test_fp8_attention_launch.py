"""fp8 attention on GPUs: launch choices, refusals, machine code, order of programs."""

import pytest
import torch

from hunyuan_fast.dispatch import explain, implementations
from hunyuan_fast.kernels.fp8_attention import config, reference
from tests.kit import gpu
from tests.kit.aot import Specialisation, compile_ahead
from tests.ops.fp8_attention_cases import DTYPES, ROOM, draw_call, errors, judge, run

KERNELS = f"hunyuan_fast.kernels.{ROOM}.triton_kernels"
# What a multiprocessor lends a program, in bytes.
SHARED = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}


def triton():
    """The implementation, or why this test is skipped."""
    pytest.importorskip("triton")
    arguments = reference.example(torch.device("cpu"))
    if "triton_impl" not in implementations(ROOM):
        pytest.skip(explain(ROOM, *arguments)["triton_impl"])
    return implementations(ROOM)["triton_impl"]


@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128])
def test_tiles_hold_a_head_and_keys_of_one_scale(head_dim):
    for large in (True, False):
        tile = config.attend_tile(head_dim, large_memory=large)
        assert head_dim <= tile.block < 2 * head_dim + 1 and tile.block & (tile.block - 1) == 0
        assert reference.KEY_BLOCK % tile.keys == 0 and tile.keys % reference.GROUP == 0
        codes = tile.block * (tile.queries + 2 * tile.keys * tile.num_stages)
        assert codes <= SHARED[90 if large else 89]


def test_triton_refusals(generator, monkeypatch):
    impl = triton()

    def reason(**options: object) -> str | None:
        return impl.supports(*draw_call(generator, **options).arguments)

    assert reason() is None
    assert "at most 128, it is 144" in reason(head_dim=144)
    assert "multiple of 16, it is 72" in reason(head_dim=72)
    assert "empty" in reason(length=0, lengths=(0,))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        assert "must be on a CUDA device" in reason()


def test_old_gpus_are_refused(monkeypatch):
    from torch._subclasses import FakeTensorMode

    impl = triton()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with FakeTensorMode():
        x = torch.empty(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        assert "compute capability 8.9" in impl.supports(x, x, x, None, 1.0)


def test_programs_do_not_depend_on_their_order(generator):
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    triton()
    from tests.kit.interpreter import shuffled_programs

    call = draw_call(generator, length=140, lengths=(140, 90), heads=1)
    straight = run("triton_impl", call)
    for seed in range(2):
        with shuffled_programs(seed):
            assert torch.equal(run("triton_impl", call), straight)


SIZES = {"num_heads": "i32", "length": "i32"}
STRIDES = {"b": "i64", "l": "i32", "n": "i32"}


def _strides(*names: str) -> dict[str, str]:
    return {f"stride_{name}{axis}": kind for name in names for axis, kind in STRIDES.items()}


def specialisations(dtype: str, head_dim: int, arch: int) -> list[Specialisation]:
    """Every kernel as the launcher asks for it."""
    tile = config.attend_tile(head_dim, large_memory=arch != 89)
    known = {"kv_len_ptr": "*i32", **SIZES}
    width = {"D": head_dim, "BLOCK_D": config.lanes_of(head_dim)}
    codes = {f"{x}_ptr": "*fp8e4nv" for x in "qkv"} | {f"{x}_scale_ptr": "*fp32" for x in "qkv"}
    stages = reference.rotated(head_dim).bit_length() - 1

    def each(kernel: str, signature: dict, constants: dict, **launch: int) -> Specialisation:
        return Specialisation(
            module=KERNELS,
            kernel=kernel,
            signature=signature,
            constants={**width, **constants},
            unaligned=tuple(x for x in ("num_heads", "length", "chunks") if x in signature),
            arch=arch,
            **launch,
        )

    coded = {"x_ptr": dtype, **known, "codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    coded |= {"padded": "i32", "factor": "fp32", **_strides("")}
    of_rows = {"ROWS": reference.KEY_BLOCK, "STAGES": stages}
    parts = {"parts_ptr": "*fp32", "chunks": "i32", **known}
    means = {f"{x}_ptr": "*fp32" for x in ("key_mean", "value_mean", "value_peak")}
    attended = {**codes, "v_mean_ptr": "*fp32", **known, "out_ptr": dtype, "padded": "i32"}
    return [
        each(
            "attend_kernel",
            {**attended, **_strides("o")},
            {"stride_od": 1, "QUERIES": tile.queries, "KEYS": tile.keys},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        ),
        each(
            "rows_kernel",
            {**coded, "mean_ptr": "*fp32"},
            of_rows,
            num_warps=config.num_warps_of(reference.KEY_BLOCK),
        ),
        each("rows_kernel", coded, {**of_rows, "ROWS": reference.QUERY_BLOCK, "mean_ptr": None}),
        each(
            "values_kernel",
            {"v_ptr": dtype, "mean_ptr": "*fp32", "peak_ptr": "*fp32", **known}
            | {"codes_ptr": "*fp8e4nv", "padded": "i32", **_strides("")},
            {"KEYS": reference.KEY_BLOCK},
        ),
        each(
            "statistics_kernel",
            {"k_ptr": dtype, "v_ptr": dtype, **parts, **_strides("k", "v")},
            {"CHUNK": config.CHUNK, "STEP": config.STEP},
        ),
        each("merge_kernel", {**parts, **means}, {}, num_warps=1),
    ]


@pytest.mark.parametrize("arch", [89, 90, 100])
def test_triton_kernels_compiled_ahead_are_lean(arch):
    pytest.importorskip("triton")
    wanted = specialisations("*bf16", 128, arch)
    if arch == 90:
        wanted += [specialisations("*bf16", head_dim, arch)[0] for head_dim in (64, 96)]
    else:
        wanted = [x for x in wanted if x.kernel in ("attend_kernel", "values_kernel")]
    for asked, report in zip(wanted, compile_ahead(wanted), strict=True):
        report.assert_lean(min_access_bits=64 if asked.kernel == "merge_kernel" else 128)
        assert report.shared_bytes <= SHARED[arch], asked
        if asked.kernel == "attend_kernel":
            assert set(report.tensor_core_instructions) == {PRODUCTS[arch]}, asked
            if arch == 90:  # steps of 32 features and keys, each once: no copy of the loop
                steps = asked.constants["BLOCK_D"] // 32 + asked.constants["KEYS"] // 32
                assert report.tensor_core_instructions["QGMMA"] == steps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_on_a_gpu(head_dim, dtype, generator):
    length = gpu.size(300, 70)
    sizes = {"length": length, "lengths": (0, 1, length, length // 2), "head_dim": head_dim}
    call = draw_call(generator, **sizes, dtype=dtype, outliers=4.0).map(lambda x: x.cuda())
    judge("triton_impl", run("triton_impl", call), call)
    gpu.assert_same_bits_at_every_run(lambda: [run("triton_impl", call)], gpu.FEW)


@pytest.mark.gpu
def test_a_long_sequence_on_a_gpu():
    impl = implementations(ROOM)["triton_impl"]
    generator = torch.Generator().manual_seed(0)
    length = gpu.size(4096, 130)
    call = draw_call(generator, length=length, lengths=(length,), head_dim=128, outliers=10.0)
    call = call.map(lambda x: x.cuda())
    out = impl.forward(*call.arguments)
    cosine, relative = errors(out, call)
    assert cosine > 0.9999 and relative < gpu.size(0.01, 0.02)  # fewer keys cancel less
