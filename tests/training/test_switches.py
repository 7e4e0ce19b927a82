"""The precision and speed switches: each does what it promises where this machine can tell, and evaluation stays float32."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.backbone import BACKBONES
from bench.config import ConfigError, TrainConfig, load_settings
from bench.evaluation.read_out import read_out
from bench.matrix import Training
from bench.method import METHODS
from bench.runtime.engine import CUBLAS, Engine, check_engine
from bench.runtime.strategy import numerics
from bench.sweep.plan import make_plan
from bench.sweep.store import Store, read_cell_rows, read_records
from bench.sweep.trial import PICTURES
from bench.training.build import build_classifier, build_reader
from bench.training.ema import WeightAverage
from bench.training.trainer import load_trained
from tests.training.one_training import start

ONE = {"run__guidance": ["au"], "run__methods": ["cam", "gradcam"]}


def rows(folder):
    return {record.cell.method: read_cell_rows(cell) for cell, record in read_records(folder)}


def train_briefly(go, project, name, **switches):
    """A run into a folder of its own; returns its rows by method."""
    assert not go(**ONE, run__results=project / name, **switches).failed
    return rows(project / name)


def weights(folder):
    (best,) = folder.glob("trainings/*/best/00000002/model.safetensors")
    return load_file(best)


def test_every_switch_is_part_of_the_trainings_identity(prepared):
    def key(*sets):
        plan = make_plan(load_settings(environ={}, sets=["run.guidance=['au']", *sets]))
        return plan.matrix.trainings[0].training.key

    switches = [
        "train.precision=bf16",
        "train.tf32=true",
        "train.channels_last=true",
        "train.compile=true",
        "train.sync_batchnorm=true",
        "train.ema=0.99",
        "train.deterministic=true",
        "train.engine=deepspeed",
    ]
    assert len({key(), *map(key, switches)}) == 1 + len(switches)
    assert key("train.checkpoint_minutes=1") == key()


# precision


def test_trained_in_bfloat16_a_classifier_is_evaluated_and_read_out_in_float32(go, project, monkeypatch, fresh_accelerate):
    seen = {"training": set(), "evaluation": set()}

    def watch(module, arguments, output):
        if len(output) > PICTURES:  # not in the trial of the plan
            seen["training" if module.training else "evaluation"].add(output.dtype)

    build = nn.Conv2d.__init__

    def watched(self, *arguments, **options):
        build(self, *arguments, **options)
        self.register_forward_hook(watch)

    monkeypatch.setattr(nn.Conv2d, "__init__", watched)
    results = train_briefly(go, project, "bf16", train__precision="bf16")
    assert seen == {"training": {torch.bfloat16}, "evaluation": {torch.float32}}
    assert results["gradcam"].logits.dtype == np.float32


def test_maps_of_a_bfloat16_training_are_those_of_a_float32_evaluation(go, project, monkeypatch, fresh_accelerate):
    train_briefly(go, project, "bf16", train__precision="bf16")
    monkeypatch.chdir(project)
    plan = make_plan(load_settings(environ={}, flags={"run.guidance": ["au"], "run.methods": ["gradcam"], "train.precision": "bf16"}))
    (cell,) = plan.matrix.cells
    classifier = load_trained(cell.training, Store(project / "bf16").training_folder(cell.training), num_classes=7)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    reader, images, classes = build_reader(cell), torch.rand(3, 3, 32, 32), torch.tensor([0, 3, 6])
    maps = read_out(reader, classifier, classifier(images), classes)
    double = classifier.double()
    exact = read_out(reader, double, double(images.double()), classes)
    torch.testing.assert_close(maps, exact, rtol=1e-4, atol=1e-7)
    classifier.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = read_out(reader, classifier, classifier(images), classes)
    assert (coarse - exact).abs().max() > 10 * (maps - exact).abs().max(), "bfloat16 maps would have passed"


def test_fp16_without_a_gpu_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"train.precision = 'fp16' needs a GPU"):
        Engine(train=TrainConfig(precision="fp16"), device="cpu")


def test_a_precision_that_an_entry_brings_is_refused_where_the_run_has_another(prepared):
    plan = make_plan(load_settings(environ={}, sets=["run.guidance=['au']", "train.precision=bf16"]))
    training: Training = plan.matrix.trainings[0].training
    check_engine([training], TrainConfig(precision="bf16"))
    with pytest.raises(ConfigError, match=r"--set train\.precision=bf16"):
        check_engine([training], TrainConfig())


# tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_on_in_a_step_only(tf32):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with numerics(TrainConfig(tf32=tf32)):
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_an_engine_switches_off_the_tf32_that_pytorch_has_on_by_default(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Engine(device="cpu")
    assert not torch.backends.cudnn.allow_tf32


# channels_last


def test_channels_last_changes_no_result_beyond_1e4_and_is_in_effect(go, project, monkeypatch):
    plain = train_briefly(go, project, "plain")
    orders = set()
    original = nn.Conv2d.forward

    def forward(self, images):
        if self.training:
            orders.update(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (self.weight, images))
        return original(self, images)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    last = train_briefly(go, project, "last", train__channels_last=True)
    assert orders == {True}
    for name in plain:
        np.testing.assert_allclose(plain[name].logits, last[name].logits, atol=1e-4)
        np.testing.assert_allclose(plain[name].map_cosines_true, last[name].map_cosines_true, atol=1e-4)


def test_a_network_in_channels_last_order_reads_out_the_same(prepared):
    plan = make_plan(load_settings(environ={}, sets=["run.guidance=['au']", "run.methods=['cam', 'gradcam', 'layercam']"]))
    images, classes = torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 4, 6])
    for cell in plan.matrix.cells:
        classifier = build_classifier(cell.training, num_classes=7).eval()
        plain = read_out(build_reader(cell), classifier, classifier(images), classes)
        classifier.to(memory_format=torch.channels_last)
        last = read_out(build_reader(cell), classifier, classifier(images.contiguous(memory_format=torch.channels_last)), classes)
        torch.testing.assert_close(plain, last, rtol=0, atol=1e-4)


# compile


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compile_changes_no_result_beyond_1e4_and_what_is_evaluated_is_not_compiled(go, project, monkeypatch):
    plain = train_briefly(go, project, "plain", train__optimizer="sgd", train__lr=0.05)
    from torch._dynamo.utils import counters

    from bench.evaluation import read_out as reading

    counters.clear()
    compiled = []
    check = reading.check_finite

    def watch(logits, *, label):
        compiled.append(torch.compiler.is_compiling())
        check(logits, label=label)

    monkeypatch.setattr(reading, "check_finite", watch)
    fast = train_briefly(go, project, "fast", train__optimizer="sgd", train__lr=0.05, train__compile=True)
    assert counters["inductor"], "inductor, the real backend, has compiled nothing"
    assert compiled
    assert not any(compiled)
    for name in plain:
        np.testing.assert_allclose(plain[name].logits, fast[name].logits, atol=1e-4)
        np.testing.assert_allclose(plain[name].map_cosines_true, fast[name].map_cosines_true, atol=1e-4)


def test_only_the_outermost_module_is_compiled(project, go, monkeypatch):
    from bench.training import trainer

    built = []

    class Watched(trainer._Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            built.append(self)
            assert self.module._compiled_call_impl is not None
            assert all(m._compiled_call_impl is None for m in self.classifier.modules())
            self.module._compiled_call_impl = None  # this test has no time for a compiler

    monkeypatch.setattr(trainer, "_Trainer", Watched)
    train_briefly(go, project, "compiled", train__compile=True)
    assert len(built) == 1


# sync_batchnorm


def test_sync_batchnorm_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match=r"train.sync_batchnorm = true needs GPUs"):
        Engine(train=TrainConfig(sync_batchnorm=True), device="cpu")


@pytest.mark.parametrize(("processes", "kind"), [(1, nn.BatchNorm2d), (2, nn.SyncBatchNorm)])
def test_several_processes_share_batch_statistics_and_one_has_its_own(monkeypatch, processes, kind):
    engine, config = Engine(device="cpu"), TrainConfig(sync_batchnorm=True)
    monkeypatch.setattr(engine, "_train", config)  # an engine made for it needs a GPU
    monkeypatch.setattr(Engine, "world_size", property(lambda _: processes))
    monkeypatch.setattr(engine.strategy, "prepare", lambda module, optimiser, _: (module, optimiser))
    entry = BACKBONES.get("mini").target
    network = METHODS.get("cam").target
    classifier = network(network.Options(), variant="paper").classifier(
        entry.build(entry.Options(width=8, norm="batch"), image_size=32), num_classes=7
    )
    before = list(classifier.parameters())
    optimiser = torch.optim.SGD(classifier.parameters(), lr=0.1)
    module, _ = engine.prepare(nn.ModuleDict({"classifier": classifier}), optimiser, config)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert {type(m) for m in norms} == {kind}
    assert module["classifier"] is classifier, "what is evaluated is what is trained"
    assert all(a is b for a, b in zip(before, optimiser.param_groups[0]["params"], strict=True))
    assert all(a is b for a, b in zip(before, classifier.parameters(), strict=True))


# ema


def test_the_average_follows_its_definition():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    average = WeightAverage(network, decay=0.9)
    expected = {name: t.clone() for name, t in network.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        network(torch.randn(4, 1, 2, 2))
        average.update(network)
        for name, t in network.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * t if t.is_floating_point() else t.clone()
    torch.testing.assert_close(dict(average.module.state_dict()), expected)
    assert not any(p.requires_grad for p in average.module.parameters())
    assert average.module[1].num_batches_tracked == 3


def test_the_average_is_what_is_selected_and_saved(go, project, monkeypatch):
    from bench.sweep import run as sweep
    from bench.training import trainer

    averages, selected = [], []
    update, accuracy = trainer.WeightAverage.update, sweep.accuracy

    def watch(self, module):
        update(self, module)
        averages[:] = [self.module, module]

    def select(classifier, *arguments, **options):
        selected.append(classifier)
        return accuracy(classifier, *arguments, **options)

    monkeypatch.setattr(trainer.WeightAverage, "update", watch)
    monkeypatch.setattr(sweep, "accuracy", select)
    train_briefly(go, project, "ema", train__ema=0.5, train__select_every=2)
    assert [s is averages[0] for s in selected] == [True]
    saved = weights(project / "ema")
    assert all(torch.equal(saved[name], t) for name, t in averages[0].state_dict().items())
    assert any(not torch.equal(saved[name], t) for name, t in averages[1].state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["train.ema=0.9", "train.precision=bf16", "train.channels_last=true", "train.deterministic=true"])
def test_with_a_switch_a_resumed_training_ends_as_if_undisturbed(prepared, switch):
    sets = ("run.guidance=['au']", "train.epochs=3", switch)
    start(prepared, "stopped", *sets, stop=True)
    resumed, straight = start(prepared, "stopped", *sets), start(prepared, "straight", *sets)
    assert torch.equal(resumed.losses, straight.losses)
    assert all(torch.equal(resumed.weights[name], straight.weights[name]) for name in straight.weights)


# deterministic


def test_deterministic_is_on_in_a_step_and_only_there():
    torch.backends.cudnn.benchmark = True
    try:
        with numerics(TrainConfig(deterministic=True)):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


def test_an_operation_without_a_deterministic_form_fails_and_the_error_names_the_switch(go, project, monkeypatch):
    from bench.methods.cam import CAM

    def loss(self, output, batch):
        noise = torch.zeros(3)
        noise.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # the last writer wins, whoever that is
        return output.logits.mean() + noise.sum()

    monkeypatch.setattr(CAM, "loss", loss)
    outcome = go(**ONE, train__deterministic=True)
    assert len(outcome.failed) == 2
    assert all("--set train.deterministic=false" in error and "put_" in error for error in outcome.failed.values())
    assert not go(**ONE).failed


def test_deterministic_prepares_cublas_before_cuda_starts(monkeypatch):
    from bench.runtime import engine

    monkeypatch.delenv(CUBLAS, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=f"{CUBLAS}=:4096:8"):
        engine._fix_cublas()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(CUBLAS, ":16:8")
    engine._fix_cublas()
    assert engine.os.environ[CUBLAS] == ":16:8", "the user's own choice stays"


# On a GPU

GPU = ("run.guidance=['au']", "train.epochs=3", "--gpu")


@pytest.mark.gpu
def test_fp16_scales_the_loss_and_resumes_with_its_scale(prepared):
    half, full = start(prepared, "half", *GPU, "train.precision=fp16"), start(prepared, "full", *GPU)
    torch.testing.assert_close(half.losses, full.losses, rtol=0.05, atol=0.05)
    assert not torch.equal(half.losses, full.losses)
    start(prepared, "stopped", *GPU, "train.precision=fp16", stop=True)
    (state,) = (prepared / "stopped" / "checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["scaler"]["scale"] > 1
    resumed = start(prepared, "stopped", *GPU, "train.precision=fp16")
    torch.testing.assert_close(resumed.losses, half.losses, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("switch", ["train.precision=bf16", "train.tf32=true", "train.channels_last=true", "train.compile=true"])
def test_a_speed_switch_trains_nearly_what_float32_trains(prepared, switch):
    fast, full = start(prepared, "fast", *GPU, switch), start(prepared, "full", *GPU)
    torch.testing.assert_close(fast.losses, full.losses, rtol=0.05, atol=0.05)


@pytest.mark.gpu
def test_tf32_is_in_effect_on_the_device_in_a_step_only():
    torch.manual_seed(0)
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))
    exact = (a.double() @ b.double()).float()

    def error():
        return (a @ b - exact).abs().max().item()

    with numerics(TrainConfig()):
        full = error()
    with numerics(TrainConfig(tf32=True)):
        coarse = error()
    if torch.cuda.get_device_capability() >= (8, 0):
        assert coarse > 10 * full
    assert error() == full


@pytest.mark.gpu
def test_deterministic_gives_the_same_bits_twice(prepared):
    once, again = (start(prepared, name, *GPU, "train.deterministic=true") for name in ("once", "again"))
    assert torch.equal(once.losses, again.losses)
    assert all(torch.equal(once.weights[name], again.weights[name]) for name in once.weights)


@pytest.mark.gpu
def test_sync_batchnorm_trains_in_one_process_as_without(prepared):
    batch = ("backbones.mini.norm=batch", "train.deterministic=true")
    plain, shared = start(prepared, "plain", *GPU, *batch), start(prepared, "shared", *GPU, *batch, "train.sync_batchnorm=true")
    assert torch.equal(plain.losses, shared.losses)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_on_the_gpu_gives_the_losses_of_ddp(prepared, stage):
    zero = start(prepared, "zero", *GPU, "train.engine=deepspeed", f"train.zero_stage={stage}")
    torch.testing.assert_close(zero.losses, start(prepared, "ddp", *GPU).losses, rtol=1e-3, atol=1e-3)
