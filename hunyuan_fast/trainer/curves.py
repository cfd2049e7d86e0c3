"""The training curves of a run as one picture, one panel a stage."""

import json
from pathlib import Path

LOSSES = ("clip_loss", "image_loss", "loss")
PSNRS = ("clip_psnr", "image_psnr")


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every figure of a stage's log as (step, value) pairs."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        step = entry.pop("step")
        for name, value in entry.items():
            series.setdefault(name, []).append((step, value))
    return series


def draw_curves(run: Path, path: Path) -> None:
    """Draw the curves of all stages found in ``run`` into a PNG.

    Raises ImportError without matplotlib (``pip install 'hunyuan-fast[bench]'``), ValueError for a
    folder without any log.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = sorted(run.glob("*/log.jsonl"), key=lambda log: log.stat().st_mtime)
    if not stages:
        raise ValueError(f"run {str(run)!r} holds no stage with a log.jsonl")
    figure, panels = plt.subplots(1, len(stages), figsize=(3.6 * len(stages), 3), squeeze=False)
    for panel, log in zip(panels[0], stages, strict=True):
        series = read_log(log.parent)
        # the quality of a reconstruction says more than its loss
        names = [n for n in PSNRS if n in series] or [n for n in LOSSES if n in series]
        if len(names) > 1 and "loss" in names:
            names.remove("loss")
        for name in names:
            panel.plot(*zip(*series[name], strict=True), label=name.replace("_", " "), linewidth=1)
        minutes = series["seconds"][-1][1] / 60
        panel.set_title(f"{log.parent.name}: {minutes:.1f} min", fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("dB" if names[0] in PSNRS else "loss")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
