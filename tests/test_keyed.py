from __future__ import annotations

import math

import pytest
import torch

from bench.data.batch import key_hash
from bench.keyed import _mix, derive_seed, keyed_normal, keyed_normal_at, keyed_seeds, keyed_uniform

HASHES = torch.tensor([key_hash(f"sample-{i}") for i in range(2000)])


def kolmogorov_smirnov(values: torch.Tensor) -> float:
    """sqrt(n) times the largest distance to the uniform distribution; above 1.95 once in a thousand."""
    ordered, n = values.flatten().sort().values, values.numel()
    steps = torch.arange(n, dtype=torch.float64)
    return float(math.sqrt(n) * torch.maximum((ordered - steps / n).max(), ((steps + 1) / n - ordered).max()))


def seeds(*parts: int) -> torch.Tensor:
    return keyed_seeds(HASHES, *(parts or (1, 2)))


def test_mixing_is_splitmix64():
    # First outputs of the published generator for seed 1234567 (test vector of the Rosetta Code task "Pseudo-random numbers/Splitmix64").
    states = torch.tensor([(1234567 + i * 0x9E3779B97F4A7C15 + 2**63) % 2**64 - 2**63 for i in (1, 2, 3)])
    assert [v % 2**64 for v in _mix(states).tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("stream", [0, 1, 7])
def test_uniform_numbers_are_uniform(stream):
    assert kolmogorov_smirnov(keyed_uniform(seeds(), stream=stream, count=20)) < 1.95


def test_first_numbers_of_neighbouring_keys_are_uniform():
    neighbours = keyed_seeds(torch.arange(20_000), 0, 0)
    assert kolmogorov_smirnov(keyed_uniform(neighbours, stream=0, count=1)) < 1.95


def test_low_and_high_bits_fill_all_cells_evenly():
    words = keyed_uniform(seeds(), stream=3, count=32) * 2**53
    for cells in (words.long() % 64, (words / 2**47).long()):
        counts = torch.bincount(cells.flatten(), minlength=64)
        chi_square = ((counts - 1000) ** 2 / 1000).sum()
        assert chi_square < 103.4  # 63 degrees of freedom, once in a thousand


@pytest.mark.parametrize("changes", [{"stream": 1}, {"parts": (1, 3)}, {"parts": (2, 1)}, {"parts": (1, 2, 0)}])
def test_streams_epochs_and_seeds_are_uncorrelated(changes):
    a = keyed_uniform(seeds(), stream=0, count=20)
    b = keyed_uniform(seeds(*changes.get("parts", (1, 2))), stream=changes.get("stream", 0), count=20)
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert abs(correlation) < 3.3 / math.sqrt(a.numel())
    assert not torch.equal(a, b)


def test_successive_numbers_of_a_seed_are_uncorrelated():
    a = keyed_uniform(seeds(), stream=0, count=21)
    assert abs(torch.corrcoef(torch.stack([a[:, 1:].flatten(), a[:, :-1].flatten()]))[0, 1]) < 3.3 / math.sqrt(40_000)


def test_a_sample_draws_the_same_in_any_batch_and_order():
    order = torch.randperm(len(HASHES), generator=torch.Generator().manual_seed(0))[:77]
    some = keyed_seeds(HASHES[order], 1, 2)
    assert torch.equal(keyed_uniform(some, stream=1, count=5), keyed_uniform(seeds(), stream=1, count=5)[order])
    assert torch.equal(keyed_normal(some, stream=2, shape=(3, 5)), keyed_normal(seeds(), stream=2, shape=(3, 5))[order])


def test_first_numbers_do_not_depend_on_the_count():
    assert torch.equal(keyed_uniform(seeds(), stream=1, count=2), keyed_uniform(seeds(), stream=1, count=9)[:, :2])


def test_normal_numbers_are_normal():
    values = keyed_normal(seeds()[:200], stream=5, shape=(10, 21))
    assert values.shape == (200, 10, 21)
    assert values.dtype == torch.float32
    assert kolmogorov_smirnov(torch.special.ndtr(values.double())) < 1.95


def test_both_numbers_of_a_box_muller_pair_are_uncorrelated():
    a, b = keyed_normal(seeds(), stream=5, shape=(40,)).split(20, dim=1)
    for f in (torch.Tensor.clone, torch.square):
        assert abs(torch.corrcoef(torch.stack([f(a).flatten(), f(b).flatten()]))[0, 1]) < 3.3 / math.sqrt(40_000)


def test_normal_numbers_at_places_are_those_of_the_whole_field():
    seed = seeds()[:1]
    field = keyed_normal_at(seed.expand(100), torch.arange(100), stream=4, count=3)
    assert torch.equal(keyed_normal_at(seed.expand(2), torch.tensor([17, 3]), stream=4, count=3), field[[17, 3]])
    assert field.unique().numel() == 300


def test_derived_seeds_tell_parts_apart():
    parts = [(1,), ("1",), ("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (2, 1), (12,), (-1,), ()]
    derived = {derive_seed(*p) for p in parts}
    assert len(derived) == len(parts)
    assert all(0 <= value < 2**63 for value in derived)


def test_derived_seeds_never_change():
    assert derive_seed("data", 0) == 2186799179237357233
