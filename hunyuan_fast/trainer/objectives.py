"""What is minimised, as pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hunyuan_fast.samplers.schedule import shift_sigmas


def logit_normal_sigmas(batch: int, *, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels for training, (B,) float32 in (0, 1).

    The sigmoid of a standard normal (technical report, section 4.5), then shifted as in sampling:
    larger shifts train more at high noise. Each batch is stratified, so that it covers the range.
    """
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    order = torch.randperm(batch, generator=generator)
    normal = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))[order]
    return shift_sigmas(torch.sigmoid(normal), shift)


def add_noise(data: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) * data + sigma * noise for data, noise (B, ...) and sigmas (B,)."""
    sigmas = sigmas.view(-1, *([1] * (data.dim() - 1)))
    return (1 - sigmas) * data + sigmas * noise


def flow_matching_loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error against noise - data (section 4.5, noise at time 1 as in the release)."""
    return F.mse_loss(velocity.float(), noise - data)


def next_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of token l + 1 given those up to l; logits (B, L, V), tokens, mask (B, L)."""
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    kept = mask[:, 1:].flatten()
    return (losses * kept).sum() / kept.sum()


def contrastive_loss(first: Tensor, second: Tensor, temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE of pairs (B, P) and (B, P): row i of one belongs to row i of the other."""
    first, second = F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)
    scores = first @ second.T / temperature
    own = torch.arange(len(first), device=first.device)
    return 0.5 * (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own))
