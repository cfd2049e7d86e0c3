"""Seconds that messages take between GPUs of a group, within a node and across."""

from __future__ import annotations

from math import ceil, log2

from hunyuan_fast.planning.hardware import Hardware
from hunyuan_fast.planning.layouts import Group


def hop_seconds(size: float, group: Group, hardware: Hardware) -> float:
    """One message of `size` bytes to the next rank, for all ranks of a ring at once.

    Where the ring leaves a node the slowest hop counts, because all wait for it.
    """
    if group.size == 1:
        return 0.0
    if group.within(hardware.node) < group.size:
        return size / hardware.network_rate + hardware.network_us * 1e-6
    return size / hardware.link_rate + hardware.link_us * 1e-6


def exchange_seconds(size: float, group: Group, hardware: Hardware) -> float:
    """An all-to-all in which each rank sends `size` bytes, as much to each of the others."""
    if group.size == 1:
        return 0.0
    inside = group.within(hardware.node)
    abroad = size * (group.size - inside) / (group.size - 1)
    at_home = (size - abroad) / hardware.link_rate
    rounds = ceil(log2(group.size))
    if inside == group.size:
        return at_home + rounds * hardware.link_us * 1e-6
    return max(at_home, abroad / hardware.network_rate) + rounds * hardware.network_us * 1e-6


def gather_seconds(size: float, group: Group, hardware: Hardware) -> float:
    """An all-gather to `size` bytes on every rank, or a reduce-scatter of as many.

    Through the links of one GPU within a node. Across nodes rings cross from each GPU of a node to
    its like in the next one, so the node with the fewest GPUs of the group holds up the others.
    Messages follow each other around the ring within nodes, then around the nodes.
    """
    if group.size == 1:
        return 0.0
    inside = group.within(hardware.node)
    nodes = ceil(group.size / inside)
    at_home = size * (group.size - 1) / group.size / hardware.link_rate
    crossing = group.size % inside or inside
    abroad = 0.0
    if nodes > 1:
        abroad = size * (group.size - 1) / group.size / crossing / hardware.network_rate
    waits = (inside - 1) * hardware.link_us + (nodes - 1) * hardware.network_us
    if inside == 1:
        at_home = 0.0
    return max(at_home, abroad) + waits * 1e-6


def reduce_seconds(size: float, group: Group, hardware: Hardware) -> float:
    """An all-reduce of `size` bytes: scattered, then gathered."""
    return 2 * gather_seconds(size, group, hardware)
