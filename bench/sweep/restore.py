"""From the folder of a finished training to its network, without the plan that made it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from bench.backbone import BACKBONES
from bench.matrix import DatasetRef, Training
from bench.method import METHODS, Classifier
from bench.prepare.preparation import Preparation, read_preparation
from bench.registry import foreign_code
from bench.training.trainer import TRAINED, load_trained, read_trained

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A trained network and its training."""

    training: Training
    classes: tuple[str, ...]
    classifier: Classifier
    """The network with its selected weights, in eval mode, on the CPU."""
    preparation: Preparation | None = None
    """Preparation of the training's pictures. None in folders of older versions."""


def restore(folder: Path) -> Restored:
    """Load a folder ``trainings/<hash>`` of a results folder.

    Raises:
        FileNotFoundError: the folder holds no finished training.
        ValueError: an older version wrote the folder, it is damaged, or its method or backbone is not installed.
    """
    try:
        trained = read_trained(folder)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no finished training: give a folder <results>/trainings/<hash>; bench plan shows the hashes"
        ) from None
    if "identity" not in trained:
        raise ValueError(f"{folder}/trained.json does not say what was trained: an older version wrote it. Train it again with bench run")
    identity, classes = trained["identity"], tuple(trained["classes"])
    METHODS.get(identity["trains_as"])
    BACKBONES.get(identity["backbone"])
    training = Training(
        **{name: identity[name] for name in ("trains_as", "method_options", "variant", "guidance", "backbone", "backbone_options")},
        dataset=DatasetRef(**trained["dataset"], fingerprint=identity["dataset"], samples={}),
        seed=identity["seed"],
        settings=identity["settings"],
        scheme=int(identity["kind"].rpartition("/")[2]),
        code=identity.get("code", {}),
    )
    for name, sha256 in training.code.items():
        kind, _, entry = name.partition(" ")
        if foreign_code((METHODS if kind == "method" else BACKBONES).get(entry).target) != sha256:
            _log.warning("%s: the code of %s has changed since it was trained", folder, name)
    if training.key != trained["training"]:
        raise ValueError(f"{folder}/trained.json was changed: its key is {trained['training'][:10]}, its settings give {training.key[:10]}")
    return Restored(
        training=training,
        classes=classes,
        classifier=load_trained(training, folder, num_classes=len(classes)),
        preparation=read_preparation(trained, path=folder / TRAINED),
    )
