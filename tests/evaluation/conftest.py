"""One split to evaluate, without a training before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.backbone import BACKBONES
from bench.config import load_settings
from bench.data.batch import Reader
from bench.data.readers import open_reader
from bench.evaluation.evaluator import Evaluated, evaluate
from bench.method import METHODS, Classifier, Method
from bench.runtime.engine import Engine
from bench.runtime.observer import LogObserver
from bench.sweep.datasets import prepare_missing
from bench.sweep.plan import make_plan

SMALL = {"cnn": "mini", "vit": "mini-vit", "apvit": "mini-apvit"}
OPTIONS = {"scorecam": {"channels": 4}}
"""It runs the network once a channel."""


class Split(NamedTuple):
    """The test split of the tests: 27 small faces."""

    reader: Reader
    keys_sha256: str


@pytest.fixture
def split(project: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Prepared as by a run."""
    monkeypatch.chdir(project)
    settings = load_settings(environ={}, flags={})
    prepare_missing(make_plan(settings).sources.values(), observer=LogObserver(), plugins=())
    (source,) = make_plan(settings).sources.values()
    assert source.index is not None
    return Split(open_reader(source.folder, "test"), source.index.splits["test"].keys_sha256)


@pytest.fixture
def make_method() -> Callable[..., tuple[Method, Classifier]]:
    """A method by name and a classifier of its own on the smallest backbone it takes, untrained."""

    def make(name: str) -> tuple[Method, Classifier]:
        entry = METHODS.get(name)
        backbone = BACKBONES.get(SMALL[entry.info.backbones[0]]).target
        method = entry.target(entry.target.Options(**OPTIONS.get(name, {})), variant="paper")
        torch.manual_seed(0)
        return method, method.classifier(backbone.build(backbone.Options(), image_size=32), num_classes=7).eval()

    return make


@pytest.fixture
def evaluated(split: Split) -> Callable[..., dict[str, Evaluated]]:
    """Evaluate on the split."""

    def run(classifier: Classifier, methods: dict[str, Method], *, batch_size: int = 9) -> dict[str, Evaluated]:
        return evaluate(
            classifier,
            methods,
            split.reader,
            size=32,
            batch_size=batch_size,
            au_variant="symmetric",
            attention_layer=3 if 3 in classifier.backbone.channels else 1,
            keys_sha256=split.keys_sha256,
            engine=Engine(device="cpu"),
            observer=LogObserver(),
            label="test",
        )

    return run
