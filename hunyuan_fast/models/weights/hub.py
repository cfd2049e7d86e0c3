"""From what the user typed to a path on disk: embedded model, local path or repo id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hunyuan_fast.models.weights.errors import CheckpointError

ASSETS = Path(__file__).resolve().parents[2] / "assets"
EMBEDDED = ("nano",)

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
USEFUL = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
USEFUL += ["*model_states.pt", "*/vae/*.pt"]
_USELESS = ["*fp8*", "*.onnx*", "*flax*", "*.gguf"]


def resolve(path_or_repo: str | Path, *, only: Sequence[str] = USEFUL) -> Path:
    """The path on disk that `path_or_repo` names; a repo is downloaded or taken from the cache.

    Tried in this order: the name of an embedded model ("nano"), a local path, a repo id
    "owner/name" of the Hugging Face Hub. Of a repo the files that fit the patterns `only` come.
    Raises CheckpointError that lists what was tried.
    """
    if path_or_repo in EMBEDDED:
        folder = ASSETS / str(path_or_repo)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: the embedded model {str(path_or_repo)!r} is not in this installation; "
                "install the package again, or name a folder or a repo id"
            )
        return folder
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path

    tried = [f"embedded models {', '.join(EMBEDDED)}", f"local path {path.absolute()}"]
    if isinstance(path_or_repo, str) and _REPO_ID.fullmatch(path_or_repo):
        snapshot, reason = _snapshot(path_or_repo, only)
        if snapshot is not None:
            return snapshot
        tried.append(f"Hugging Face repo {path_or_repo} ({reason})")
    raise CheckpointError(
        f"{path_or_repo}: no such model; tried {'; '.join(tried)}. "
        'Name "nano", an existing folder or file, or a repo id "owner/name" that can be reached'
    )


def inside(root: Path, subfolder: str) -> Path:
    """The `subfolder` of `root`; raises CheckpointError unless it exists and lies inside."""
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise CheckpointError(f"{root}: subfolder must stay inside the folder, got {subfolder!r}")
    folder = root / subfolder
    if not folder.is_dir():
        present = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else "a file"
        raise CheckpointError(f"{folder}: no such folder; {root} holds {present}")
    return folder


def _snapshot(repo: str, only: Sequence[str]) -> tuple[Path | None, str]:
    """The local snapshot of a repo, or None and the reason why there is none."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None, "huggingface_hub is not installed: pip install huggingface_hub"
    reason = ""
    for cached in (False, True):
        try:
            found = snapshot_download(
                repo, allow_patterns=list(only), ignore_patterns=_USELESS, local_files_only=cached
            )
        # The hub, its HTTP client and the file system have no common base class below Exception.
        except Exception as error:
            sentence = next((line for line in str(error).splitlines() if line.strip()), "")
            reason = reason or f"{type(error).__name__}: {sentence}"
        else:
            return Path(found), ""
    return None, reason
