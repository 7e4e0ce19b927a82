"""Average maps: of every sample once, whatever the batches, and files that say what is in them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.evaluation.class_maps import SIDE, AverageMaps, ClassSums, read_average_maps, write_average_maps
from bench.evaluation.maps import enlarged
from bench.evaluation.read_out import forward, network_input, read_out
from bench.io import file_sha256
from bench.runtime.engine import Engine
from bench.sweep.store import MAPS, read_records
from bench.training.guidance import layer_attention

LABELS = torch.tensor([2, 0, 0, 2, 0, 2, 2])


class Two:
    """Stands for the engine of one of two processes: adds what the other has."""

    def __init__(self, peer):
        self._parts = iter((peer._sums, peer._count, peer._examples[:-1]))

    def sum(self, tensor):
        return tensor + next(self._parts)


def summed(maps, groups):
    sums = ClassSums(LABELS, num_classes=4, device=torch.device("cpu"))
    for group in groups:
        positions = torch.tensor(group)
        sums.add(maps[positions], positions=positions, labels=LABELS[positions])
    return sums


@pytest.mark.parametrize("groups", [[[i] for i in range(7)], [[6, 2, 4], [0, 5, 1, 3]]])
def test_neither_batches_nor_order_nor_processes_change_a_byte(groups):
    maps = torch.rand(7, 40, 40)
    whole = summed(maps, [list(range(7))]).total(Engine(device="cpu"))
    shared = summed(maps, groups[1:]).total(Two(summed(maps, groups[:1])))
    for field in dataclasses.fields(whole):
        np.testing.assert_array_equal(getattr(whole, field.name), getattr(shared, field.name))


def test_means_are_those_of_each_class_and_a_class_without_samples_is_blank():
    maps = torch.rand(7, 2 * SIDE, 2 * SIDE)
    means = summed(maps, [[0, 1, 2], [3, 4, 5, 6]]).total(Engine(device="cpu"))
    cells = F.avg_pool2d(maps[:, None], 2)[:, 0].double()
    np.testing.assert_array_equal(means.count, [3, 0, 4, 0])
    np.testing.assert_allclose(means.means[2], cells[LABELS == 2].mean(0) * 255, atol=0.51)
    assert not means.means[[1, 3]].any()
    np.testing.assert_array_equal(means.positions, [1, 2, 0, 3])
    np.testing.assert_allclose(means.examples, cells[means.positions] * 255, atol=0.51)


def test_samples_that_are_not_valid_do_not_count():
    sums = ClassSums(LABELS, num_classes=4, device=torch.device("cpu"))
    valid = torch.tensor([True, False, True, False, False, False, False])
    sums.add(torch.ones(7, 8, 8), positions=torch.arange(7), labels=LABELS, valid=valid)
    means = sums.total(Engine(device="cpu"))
    np.testing.assert_array_equal(means.count, [1, 0, 1, 0])
    assert (means.means[[0, 2]] == 255).all()


def test_the_maps_of_an_evaluation_are_the_means_of_the_maps_it_compares(make_method, evaluated, split):
    method, classifier = make_method("cam")
    average = evaluated(classifier, {"cam": method})["cam"].maps
    (raw,) = split.reader.eval_batches(rank=0, world_size=1, batch_size=27)
    with torch.inference_mode():
        output = forward(classifier, network_input(classifier, raw.images, size=32))
        expected = {"map": read_out(method, classifier, output, raw.labels), "attention": layer_attention(output.layers[3])}
    for name, maps in expected.items():
        mean = enlarged(maps, size=32)[raw.labels == 3].double().mean(0)
        np.testing.assert_allclose(getattr(average, name)[3], 255 * mean, atol=0.51)
    assert average.count.sum() == 27
    assert not average.au_map[split.reader.classes.index("neutral")].any()


def test_another_batch_size_moves_a_byte_by_one_at_most(make_method, evaluated):
    method, classifier = make_method("cam")
    single, many = (evaluated(classifier, {"cam": method}, batch_size=size)["cam"].maps for size in (1, 64))
    for field in dataclasses.fields(AverageMaps):
        a, b = (getattr(maps, field.name).astype(int) for maps in (single, many))
        assert np.abs(a - b).max() <= 1, field.name


def test_a_record_names_the_hash_of_its_maps(go, project):
    go(run__guidance=["none"])
    ((folder, record),) = read_records(project / "results")
    assert file_sha256(folder / MAPS) == record.maps_sha256
    assert read_average_maps(folder / MAPS).count.sum() == record.data.samples


def test_what_is_no_file_of_maps_is_refused(tmp_path):
    path = tmp_path / MAPS
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"maps\.safetensors is not a file of average maps"):
        read_average_maps(path)


def test_maps_survive_their_file(tmp_path):
    means = summed(torch.rand(7, 40, 40), [list(range(7))]).total(Engine(device="cpu"))
    bytes_ = dict.fromkeys(("map", "attention", "au_map"), means.means)
    maps = AverageMaps(
        **bytes_, count=means.count, example_position=means.positions, example_map=means.examples, example_attention=means.examples
    )
    write_average_maps(tmp_path / MAPS, maps)
    again = read_average_maps(tmp_path / MAPS)
    for field in dataclasses.fields(AverageMaps):
        np.testing.assert_array_equal(getattr(maps, field.name), getattr(again, field.name))
