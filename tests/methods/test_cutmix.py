"""CutMix against pasting pixel by pixel, the statistics of its boxes, and what becomes of AU maps."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.backbone import BACKBONES
from bench.method import METHODS, Batch, Output
from bench.methods.cam import CAM
from bench.methods.cutmix import Box, CutMix, MixedBatch, random_box, symmetric_beta
from bench.training.task import GuidanceTerm, TrainingTask, guided_share

VARIANTS = ("paper", "official")


def cutmix(variant="paper", **options):
    return CutMix(CutMix.Options(**options), variant=variant)


def make_batch(*, count, size=32, grid=7, seed=0, invalid=()):
    """Pictures and maps that name their sample: pixel = sample + position / size**2, map = sample + 1."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.tensor([i not in invalid for i in range(count)])
    pixels = torch.arange(size * size).reshape(1, 1, size, size) / size**2
    return Batch(
        positions=torch.arange(count),
        seeds=torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        images=(torch.arange(count).reshape(-1, 1, 1, 1) + pixels).expand(count, 3, size, size).contiguous(),
        labels=torch.arange(count) % 7,
        au_maps=(torch.arange(count).reshape(-1, 1, 1) + 1.0).expand(count, grid, grid) * valid[:, None, None],
        au_valid=valid,
    )


def box_of(mixed, batch, partners):
    """The box as rows and columns, read off the pictures; None where it is empty."""
    i = next((i for i, p in enumerate(partners) if p != i), None)
    assert i is not None
    changed = (mixed.images[i, 0] != batch.images[i, 0]).nonzero()
    if not len(changed):
        return None
    (top, left), (bottom, right) = changed.amin(dim=0).tolist(), (changed.amax(dim=0) + 1).tolist()
    return top, bottom, left, right


def mixed_with_box(method, batch, *, seeds=range(200)):
    """A mixture whose box is neither empty nor whole, and its partners, found from labels that name the samples."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        batch = dataclasses.replace(
            batch,
            labels=torch.arange(len(batch.labels)),
            seeds=torch.randint(-(2**63), 2**63 - 1, (len(batch.labels),), generator=generator),
        )
        mixed = method.mix(batch)
        partners = mixed.labels_b.tolist()
        if 0.1 < mixed.weight < 0.9 and all(p != i for i, p in enumerate(partners)):
            return batch, mixed, partners
    raise AssertionError("no proper mixture in 200")


@given(count=st.integers(2, 6), size=st.sampled_from([16, 28, 33]), grid=st.sampled_from([4, 7, 28]), seed=st.integers(0, 2**16))
def test_pictures_maps_and_weight_are_those_of_pasting_place_by_place(count, size, grid, seed):
    batch = make_batch(count=count, size=size, grid=grid, seed=seed)
    batch = dataclasses.replace(batch, labels=torch.arange(count))
    mixed = cutmix().mix(batch)
    partners = mixed.labels_b.tolist()
    assert sorted(partners) == list(range(count)), "a permutation"
    assert torch.equal(mixed.labels, batch.labels)
    if all(p == i for i, p in enumerate(partners)):
        return
    top, bottom, left, right = box_of(mixed, batch, partners) or (0, 0, 0, 0)
    assert mixed.weight.item() == pytest.approx(1 - (bottom - top) * (right - left) / size**2, abs=1e-6)
    for i, p in enumerate(partners):
        expected = batch.images[i].clone()
        expected[:, top:bottom, left:right] = batch.images[p][:, top:bottom, left:right]
        assert torch.equal(mixed.images[i], expected)
        for y in range(grid):
            for x in range(grid):
                cell = Fraction(size, grid)
                height = max(Fraction(0), min((y + 1) * cell, Fraction(bottom)) - max(y * cell, Fraction(top)))
                width = max(Fraction(0), min((x + 1) * cell, Fraction(right)) - max(x * cell, Fraction(left)))
                share = float(height * width / cell**2)
                assert mixed.au_maps[i, y, x].item() == pytest.approx((i + 1) * (1 - share) + (p + 1) * share, rel=1e-5)


@given(edges=st.tuples(*[st.integers(0, 32)] * 4), grid=st.integers(1, 40), size=st.just(32))
def test_the_cells_of_a_box_add_up_to_its_area(edges, grid, size):
    top, bottom = sorted(edges[:2])
    left, right = sorted(edges[2:])
    box = Box(**{k: torch.tensor(v) for k, v in {"top": top, "bottom": bottom, "left": left, "right": right}.items()})
    coverage = box.coverage(size=size, grid=grid)
    assert coverage.amin() >= 0
    assert coverage.amax() <= 1
    assert coverage.sum().item() / grid**2 == pytest.approx(float(box.share(size)), abs=1e-12)


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 3.0])
def test_the_kept_share_is_beta_distributed(beta):
    """Kolmogorov-Smirnov distance to numpy's own generator, and the two first moments."""
    count = 20_000
    generator = torch.Generator().manual_seed(1)
    values = symmetric_beta(*torch.rand(2, count, generator=generator, dtype=torch.float64), beta=beta).sort().values.numpy()
    reference = np.sort(np.random.default_rng(1).beta(beta, beta, 10 * count))
    both = np.concatenate([values, reference])
    distance = np.abs(np.searchsorted(values, both, "right") / count - np.searchsorted(reference, both, "right") / (10 * count)).max()
    assert distance < 1.95 * math.sqrt(1.1 / count)  # exceeded once in a thousand
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert values.var() == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.05)


def test_the_ends_of_the_uniform_range_give_numbers():
    u = torch.tensor([0.0, 0.0, 1 - 2.0**-53, 2.0**-53], dtype=torch.float64)
    v = torch.tensor([0.0, 0.5, 0.25, 0.25], dtype=torch.float64)
    for beta in (0.01, 1.0, 50.0):
        value = symmetric_beta(u, v, beta=beta)
        assert ((value >= 0) & (value <= 1)).all()


def test_boxes_are_distributed_as_those_of_the_published_code():
    """Share of the picture outside of the box, and the edges, against a plain numpy version of what is published."""
    size, count = 32, 3000
    own = np.array([_edges(random_box(torch.tensor([seed]), size=size, beta=1.0, probability=1.0)) for seed in range(count)])
    numpy = np.random.default_rng(0)
    published = []
    for _ in range(10 * count):
        kept = numpy.beta(1.0, 1.0)
        half = int(size * math.sqrt(1 - kept)) // 2
        row, column = numpy.integers(size), numpy.integers(size)
        published.append([max(row - half, 0), min(row + half, size), max(column - half, 0), min(column + half, size)])
    published = np.array(published)

    def kept_share(edges):
        return 1 - (edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]) / size**2

    for values, reference in [(kept_share(own), kept_share(published)), *zip(own.T, published.T, strict=True)]:
        error = reference.std() / math.sqrt(count)
        assert abs(values.mean() - reference.mean()) < 4.5 * error
        assert values.std() == pytest.approx(reference.std(), rel=0.06)


def _edges(box):
    return [int(v) for v in (box.top, box.bottom, box.left, box.right)]


def test_the_probability_is_the_share_of_mixed_batches():
    empty = [
        float(random_box(torch.tensor([seed]), size=224, beta=1.0, probability=p).share(224)) == 0
        for p in (0.0, 0.3, 1.0)
        for seed in range(600)
    ]
    assert all(empty[:600])
    assert abs(sum(empty[600:1200]) / 600 - 0.7) < 4 * math.sqrt(0.21 / 600)
    assert sum(empty[1200:]) < 10


def test_partners_are_any_permutation_alike():
    counts = {}
    for seed in range(1200):
        mixed = cutmix().mix(dataclasses.replace(make_batch(count=3, size=16, seed=seed), labels=torch.arange(3)))
        counts[tuple(mixed.labels_b.tolist())] = counts.get(tuple(mixed.labels_b.tolist()), 0) + 1
    assert len(counts) == 6
    chi_square = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi_square < 20.5  # one in a thousand, 5 degrees of freedom


def test_every_seed_of_the_batch_has_a_say_in_the_box():
    batch = make_batch(count=4)
    weights = {cutmix().mix(batch).weight.item()}
    for i in range(4):
        seeds = batch.seeds.clone()
        seeds[i] += 1
        weights.add(cutmix().mix(dataclasses.replace(batch, seeds=seeds)).weight.item())
    assert len(weights) == 5


def test_the_same_seeds_mix_alike_whatever_the_global_generator_says():
    batch = make_batch(count=5)
    torch.manual_seed(1)
    first, state = cutmix().mix(batch), torch.get_rng_state()
    assert torch.equal(state, torch.manual_seed(1).get_state()), "nothing was drawn from it"
    torch.manual_seed(2)
    second = cutmix().mix(batch)
    for field in dataclasses.fields(MixedBatch):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))


def test_mixing_leaves_the_batch_as_it_was():
    batch = make_batch(count=5)
    before = {f.name: getattr(batch, f.name).clone() for f in dataclasses.fields(Batch)}
    cutmix().mix(batch)
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())


def test_paper_keeps_exactly_the_samples_with_an_au_map_of_their_own():
    batch, mixed, partners = mixed_with_box(cutmix("paper"), make_batch(count=6, grid=8, invalid=(1, 4)))
    assert mixed.au_valid.tolist() == batch.au_valid.tolist()
    top, bottom, left, right = box_of(mixed, batch, partners)
    for i, p in enumerate(partners):
        inside = mixed.au_maps[i, -(-top // 4) : bottom // 4, -(-left // 4) : right // 4]
        expected = 0.0 if i in (1, 4) or p in (1, 4) else p + 1.0
        assert (inside == expected).all(), "a partner without AU map contributes zeros"
        assert (mixed.au_maps[i] > 0).any() == (i not in (1, 4))


def test_official_keeps_only_pairs_that_both_have_an_au_map():
    _, mixed, partners = mixed_with_box(cutmix("official"), make_batch(count=6, invalid=(1, 4)))
    assert mixed.au_valid.tolist() == [i not in (1, 4) and p not in (1, 4) for i, p in enumerate(partners)]
    assert (mixed.au_maps[~mixed.au_valid] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_official_validity_is_that_of_infinite_maps_pasted_at_full_size(seed):
    batch = dataclasses.replace(make_batch(count=5, grid=32, invalid=(0, 3), seed=seed), labels=torch.arange(5))
    mixed = cutmix("official", probability=0.7).mix(batch)
    partners = mixed.labels_b.tolist()
    maps = batch.au_maps.masked_fill(~batch.au_valid[:, None, None], float("inf"))
    pasted = maps.clone()
    if any(p != i for i, p in enumerate(partners)):
        box = box_of(mixed, batch, partners)
        if box:
            top, bottom, left, right = box
            pasted[:, top:bottom, left:right] = maps[partners][:, top:bottom, left:right]
    valid = pasted.isfinite().flatten(1).all(dim=1)
    assert torch.equal(mixed.au_valid, valid)
    torch.testing.assert_close(mixed.au_maps[valid], pasted[valid])


def test_paper_drops_a_sample_whose_units_the_box_hides():
    """Units in one pixel's cell only, and partners without any: where the box covers that cell, nothing is left to align."""
    hidden = 0
    for seed in range(60):
        batch = make_batch(count=4, size=32, grid=32, seed=seed, invalid=(2, 3))
        maps = torch.zeros_like(batch.au_maps)
        maps[:2, 16, 16] = 1.0
        batch = dataclasses.replace(batch, au_maps=maps, labels=torch.arange(4))
        mixed = cutmix("paper").mix(batch)
        covered = mixed.images[:, 0, 16, 16] != batch.images[:, 0, 16, 16]
        for i in (0, 1):
            gone = bool(covered[i]) and mixed.labels_b[i].item() in (2, 3)
            hidden += gone
            assert mixed.au_valid[i].item() is not gone
    assert hidden > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_box_the_batch_stays_itself(variant):
    batch = make_batch(count=5, invalid=(2,))
    mixed = cutmix(variant, probability=0.0).mix(batch)
    assert mixed.weight == 1
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(mixed, field.name), getattr(batch, field.name)), field.name


def test_the_loss_weighs_both_labels():
    _, mixed, partners = mixed_with_box(cutmix(), make_batch(count=6))
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    loss = cutmix().loss(Output(logits=logits, layers={}), mixed)
    log_p = logits.log_softmax(dim=1)
    weight = mixed.weight.item()
    expected = -sum(weight * log_p[i, i] + (1 - weight) * log_p[i, p] for i, p in enumerate(partners)) / 6
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_and_explains(variant):
    target = BACKBONES.get("mini").target
    torch.manual_seed(0)
    backbone = target.build(target.Options(width=8), image_size=32)
    method = cutmix(variant)
    classifier = method.classifier(backbone, num_classes=7)
    task = TrainingTask(classifier, method, GuidanceTerm(weight=9.0, layers=(4,))).train()
    batch = method.mix(make_batch(count=6, invalid=(0,)))
    result = task(batch, guided_share(int(batch.au_valid.sum()), parts=1))
    result["loss"].backward()
    assert result["guidance"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in classifier.parameters())
    classifier.zero_grad()
    with torch.inference_mode():
        maps = method.maps(classifier.eval(), classifier(batch.images), batch.labels)
    assert maps.shape == (6, 4, 4)
    assert all(p.grad is None for p in classifier.parameters())


def test_it_trains_as_itself_and_reads_out_as_cam():
    entry = METHODS.get("cutmix")
    assert entry.info.kind == "trained"
    # The published CutMix and CAM share network, head and read-out, and their golden files hold the same numbers.
    assert CutMix.maps is CAM.maps
    assert CutMix.classifier is CAM.classifier
    assert [(d.key, d.value) for d in entry.info.defaults] == [("guidance.layers", (4,))]
