"""Learning rate as a pure function of the step."""

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, final: float = 0.02) -> float:
    """Factor on the peak learning rate: linear for ``warmup`` steps, then a cosine to ``final``.

    step: 0-based, below ``steps``. Returns a number in (0, 1].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
