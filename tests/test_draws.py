"""Random numbers inside of a network: functions of (seed, step, sample), whoever asks for them."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from bench.draws import drawing, sample_kept, site_of, step_uniform
from bench.training.random_layers import GeneratorWatch, KeyedDropout, batch_statistics, enough_for_batch_norm, key_random_layers

SAMPLES = torch.arange(6) * 7919
SITE = site_of("layer")


def network():
    return nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout2d(0.5), DropPath(0.5)), nn.Dropout(0.0))


def test_a_batch_in_parts_is_dropped_as_the_whole():
    net = network()
    key_random_layers(net)
    images = torch.ones(6, 4, 5, 5)
    with drawing(seed=1, step=3, samples=SAMPLES):
        whole = net(images)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        with drawing(seed=1, step=3, samples=SAMPLES[rows]):
            parts.append(net(images[rows]))
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < (whole == 0).float().mean() < 1


def test_the_layers_drop_elements_channels_and_samples():
    dropped = {}
    for name, layer in (("elements", nn.Dropout(0.5)), ("channels", nn.Dropout2d(0.5)), ("samples", DropPath(0.5))):
        net = nn.Sequential(layer)
        key_random_layers(net)
        with drawing(seed=0, step=0, samples=torch.arange(64)):
            dropped[name] = net(torch.ones(64, 8, 5, 5)) == 0
        assert dropped[name].float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert 0 < dropped["elements"][0, 0].float().mean() < 1
    channels = dropped["channels"].flatten(2).float().mean(dim=2)
    assert set(channels.unique().tolist()) == {0.0, 1.0}
    assert 0 < channels[0].mean() < 1
    assert set(dropped["samples"].flatten(1).float().mean(dim=1).unique().tolist()) == {0.0, 1.0}


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    layer = KeyedDropout(rate=0.25, site=SITE, dims=None)
    with drawing(seed=0, step=0, samples=torch.arange(1000)):
        values = layer(torch.ones(1000, 100))
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert values.mean().item() == pytest.approx(1, abs=0.01)


def test_steps_samples_seeds_and_layers_draw_different_numbers():
    def kept(seed=0, step=0, site=SITE, samples=SAMPLES):
        with drawing(seed=seed, step=step, samples=samples):
            return sample_kept(site, rows=6, count=64, rate=0.5)

    first = kept()
    assert len({tuple(row.tolist()) for row in first}) == 6
    for changed in (kept(seed=1), kept(step=1), kept(site=site_of("another")), kept(samples=SAMPLES + 1)):
        assert not torch.equal(first, changed)
    assert torch.equal(first, kept())


def test_a_layer_used_twice_in_a_step_draws_twice():
    with drawing(seed=0, step=0, samples=SAMPLES):
        first, second = (sample_kept(SITE, rows=6, count=64, rate=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_several_rows_a_sample_are_neighbours():
    with drawing(seed=0, step=0, samples=SAMPLES):
        windows = sample_kept(SITE, rows=12, count=8, rate=0.5)
    with drawing(seed=0, step=0, samples=SAMPLES[3:]):
        half = sample_kept(SITE, rows=6, count=8, rate=0.5)
    assert torch.equal(windows[6:], half)


def test_a_number_of_the_step_is_the_same_for_any_samples():
    with drawing(seed=5, step=2, samples=SAMPLES):
        first = step_uniform(SITE)
    with drawing(seed=5, step=2, samples=SAMPLES[:1]):
        assert step_uniform(SITE) == first


def test_numbers_of_steps_are_uniform():
    numbers = []
    for step in range(400):
        with drawing(seed=0, step=step, samples=SAMPLES):
            numbers.append(step_uniform(SITE).item())
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.06)
    assert min(numbers) < 0.02
    assert max(numbers) > 0.98


def test_outside_of_a_step_a_layer_draws_as_any_other():
    net = network()
    key_random_layers(net)
    torch.manual_seed(0)
    first = net(torch.ones(2, 4, 5, 5))
    assert not torch.equal(first, net(torch.ones(2, 4, 5, 5)))
    torch.manual_seed(0)
    assert torch.equal(first, net(torch.ones(2, 4, 5, 5)))


def test_in_eval_mode_nothing_is_dropped_and_names_of_weights_stay():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    plain = copy.deepcopy(net).eval()
    key_random_layers(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    values = torch.rand(4, 3)
    assert torch.equal(net.eval()(values), plain(values))


def test_a_layer_that_draws_from_torchs_generator_is_seen():
    watch = GeneratorWatch(torch.device("cpu"))
    with drawing(seed=0, step=0, samples=SAMPLES):
        sample_kept(SITE, rows=6, count=9, rate=0.5)
        step_uniform(SITE)
    assert not watch.drawn()
    nn.functional.dropout(torch.ones(3), 0.5)
    assert watch.drawn()


@pytest.mark.parametrize(
    ("layer", "depends"), [(nn.BatchNorm2d(3), True), (nn.SyncBatchNorm(3), False), (nn.GroupNorm(1, 3), False), (nn.LayerNorm(3), False)]
)
def test_batch_statistics_of_a_process_are_seen(layer, depends):
    assert batch_statistics(nn.Sequential(layer)) == depends
    assert not batch_statistics(nn.Sequential(layer).eval())


def small_maps():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))


def test_a_batch_norm_with_one_value_a_channel_names_the_setting_and_the_layer():
    net = small_maps()
    message = r"train\.batch_size gives a process 1 sample at once, and batch norm \(1\) needs more"
    with pytest.raises(ValueError, match=message), enough_for_batch_norm(net, samples=1):
        net(torch.ones(1, 3, 1, 1))


def test_a_single_sample_will_do_where_maps_have_several_places():
    net = small_maps()
    with enough_for_batch_norm(net, samples=1):
        assert net(torch.ones(1, 3, 2, 2)).shape == (1, 5, 2, 2)


def test_another_error_of_a_network_is_left_as_it_is():
    with pytest.raises(ValueError, match=r"^something else$"), enough_for_batch_norm(small_maps(), samples=1):
        raise ValueError("something else")
