"""Print the environment, who answers each op and why, and what to install for a faster one."""

import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

from hunyuan_fast.cli.parsing import parse

_PACKAGES = ("triton", "transformers", "safetensors", "numpy", "av", "pillow", "diffusers")


@dataclass(frozen=True)
class Options:
    """What ``hunyuan-fast doctor`` takes."""

    debug: bool = False
    """Show the traceback of an error."""


def run(argv: Sequence[str]) -> None:
    """Print the three parts of the diagnosis."""
    parse(Options, argv, "doctor", __doc__)
    import torch

    import hunyuan_fast

    facts = [
        ("hunyuan-fast", hunyuan_fast.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", f"{platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),  # a wheel's own number may lack what it was built for
        *((name, _version(name)) for name in _PACKAGES),
        ("native code", _native()),
        *_gpus(),
    ]
    for name, value in facts:
        print(f"{name:<14}{value}")
    print()
    print(hunyuan_fast.report())
    advice = list(_advice())
    if advice:
        print("\nfor faster ops:")
        for line in advice:
            print(f"  {line}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native() -> str:
    try:
        native = import_module("hunyuan_fast._C")
    except ImportError as error:
        return f"hunyuan_fast._C does not load: {error}"
    if not native.has_cuda:
        return f"{native.__file__}, CPU only"
    return f"{native.__file__}, CUDA for {', '.join(map(str, native.cuda_archs))}"


def _gpus() -> Iterator[tuple[str, str]]:
    import torch

    yield "torch CUDA", torch.version.cuda or "none: this is a CPU build of torch"
    if not torch.cuda.is_available():
        yield "GPU", "none"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"GPU {index}", f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"


def _advice() -> Iterator[str]:
    """What is missing here, the thing that helps most first."""
    import torch

    try:
        native = import_module("hunyuan_fast._C")
    except ImportError:
        native = None
    if native is None:
        yield "install a C++17 compiler (g++ 11 or newer), then install hunyuan-fast again"
    if torch.cuda.is_available():
        if native is not None and not native.has_cuda:
            yield "put nvcc (CUDA 12.8 or newer) on the PATH, then install hunyuan-fast again"
        if _version("triton") == "not installed":
            yield "pip install triton"
    elif torch.version.cuda is None:
        yield "with an NVIDIA GPU: install a CUDA build of torch (https://pytorch.org)"
    else:
        yield "torch finds no GPU: check the driver with nvidia-smi"
