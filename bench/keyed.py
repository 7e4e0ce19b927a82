"""Randomness as a function of (seed, epoch, sample key) and nothing else.

A counter-based generator in plain integer tensors: the same numbers on every device, in every batch, whatever was drawn
before. The mixing function is splitmix64 (G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014; constants of D. Stafford's variant 13). Integers and uniform numbers are exactly the same
everywhere; normal numbers go through log, sqrt and cos, so that another device may differ in the last bit of a float.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def keyed_seeds(hashes: Tensor, *parts: int) -> Tensor:
    """Seeds of samples, from the hashes of their keys and any further integers (seed, epoch, a purpose).

    Args:
        hashes: (B,) int64, `bench.data.batch.key_hash` of the keys.
        parts: Any integers; they count modulo 2**64, and their order matters.

    Returns:
        (B,) int64 on the device of ``hashes``.
    """
    state = _mix(hashes)
    for part in parts:
        # The part is mixed first: small neighbouring numbers must not meet neighbouring states.
        state = _mix(state ^ _signed(_mix_integer(part)))
    return state


def keyed_uniform(seeds: Tensor, *, stream: int, count: int) -> Tensor:
    """Independent numbers, uniform on [0, 1) in steps of 2**-53.

    Args:
        seeds: (B,) int64, of `keyed_seeds`.
        stream: What the numbers are for; different streams of a seed are independent.
        count: Numbers per seed; the first numbers do not depend on how many are asked for.

    Returns:
        (B, count) float64.
    """
    return keyed_words(seeds, stream=stream, count=count).to(torch.float64) * 2.0**-53


def keyed_words(seeds: Tensor, *, stream: int, count: int) -> Tensor:
    """The integers behind `keyed_uniform`, uniform on [0, 2**53): (B, count) int64."""
    return _shift(_words(seeds, stream, count), 11)


def keyed_normal(seeds: Tensor, *, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Independent standard normal numbers.

    G. Box, M. Muller, "A Note on the Generation of Random Normal Deviates" (1958), one pair of numbers from each 64-bit
    word. The largest possible magnitude is sqrt(-2 ln 2**-33) = 6.8.

    Args:
        seeds: (B,) int64, of `keyed_seeds`.
        stream: As in `keyed_uniform`; a stream must not serve both functions.
        shape: Shape of the numbers of one seed.

    Returns:
        (B, *shape) float32.
    """
    count = math.prod(shape)
    positions = torch.zeros_like(seeds)
    return keyed_normal_at(seeds, positions, stream=stream, count=count).reshape(len(seeds), *shape)


def keyed_normal_at(seeds: Tensor, positions: Tensor, *, stream: int, count: int) -> Tensor:
    """As `keyed_normal`, but only at given places of a large field, of which each place has ``count`` numbers.

    Args:
        seeds: (N,) int64, the seed of each place.
        positions: (N,) int64, the place in the field of that seed, from 0.
        stream: As in `keyed_normal`.
        count: Numbers per place; fields of a different count are different fields.

    Returns:
        (N, count) float32.
    """
    pairs = (count + 1) // 2
    words = _words(seeds, stream, pairs, skip=positions * pairs)
    # Halfway between the steps, so that the logarithm never meets 0.
    radius = _shift(words, 32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1.0).log_().mul_(-2.0).sqrt_()
    angle = words.bitwise_and_(0xFFFFFFFF).float().mul_(2.0 * math.pi * 2.0**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) for generators on the host, from anything that should tell them apart: blake2b of the parts.

    The number 1 and the text "1" are different parts, and so are ("ab", "c") and ("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def _words(seeds: Tensor, stream: int, count: int, *, skip: Tensor | int = 0) -> Tensor:
    """(B, count) int64: words of a splitmix64 sequence that starts at a mixture of seed and stream, the first ``skip`` left out."""
    start = _mix(seeds ^ _signed(_mix_integer(stream))) + skip * _signed(_GAMMA)
    steps = torch.arange(1, count + 1, device=seeds.device) * _signed(_GAMMA)
    return _mix_(start[:, None] + steps)


def _mix(values: Tensor) -> Tensor:
    return _mix_(values.clone())


def _mix_(values: Tensor) -> Tensor:
    """In place: at a number per pixel, fresh memory costs more than the arithmetic."""
    values.bitwise_xor_(_shift(values, _SHIFTS[0])).mul_(_signed(_MULTIPLIERS[0]))
    values.bitwise_xor_(_shift(values, _SHIFTS[1])).mul_(_signed(_MULTIPLIERS[1]))
    return values.bitwise_xor_(_shift(values, _SHIFTS[2]))


def _mix_integer(value: int) -> int:
    value = (value + _GAMMA) & _MASK
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value = ((value ^ value >> shift) * multiplier) & _MASK
    return value ^ value >> _SHIFTS[2]


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64 tensors shift arithmetically, so the copies of the sign are cut off."""
    return (values >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
