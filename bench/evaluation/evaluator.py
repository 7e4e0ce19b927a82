"""The evaluation: every sample of a split on exactly one process, one pass for all cells of a training, no collective inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import action_unit_maps, expression_ids
from bench.data.batch import Reader
from bench.data.index import hash_keys
from bench.data.transforms import eval_images, eval_landmarks
from bench.evaluation.maps import attention_cosines, check_finite, map_cosines, read_maps
from bench.evaluation.rows import Rows
from bench.method import Classifier, Method
from bench.training.alignment import layer_attention
from bench.training.engine import Engine
from bench.training.interruption import EverywhereError
from bench.training.observer import Observer


class CountError(EverywhereError):
    """A pass that did not see every sample exactly once: counted over all processes, so all of them raise it."""


def accuracy(classifier: Classifier, reader: Reader, *, size: int, batch_size: int, engine: Engine) -> float:
    """Accuracy over a whole split, exactly counted over all processes. Leaves the mode of the classifier as it was.

    Raises:
        StoppedError: between two batches, if this run was asked to stop.
        EverywhereError: with several processes, what went wrong on one of them.
    """
    training = classifier.training
    classifier.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=engine.device)
    with engine.together(), torch.inference_mode():
        for raw in reader.eval_batches(rank=engine.rank, world_size=engine.world_size, batch_size=batch_size):
            engine.stop.check()
            images = eval_images(raw.images.to(engine.device), size=size, mean=classifier.backbone.mean, std=classifier.backbone.std)
            logits = classifier(images).logits
            check_finite(logits, label="selection of the checkpoint")
            hits = logits.argmax(dim=1) == raw.labels.to(engine.device)
            counts += torch.stack([hits.sum(), torch.as_tensor(len(raw), device=engine.device)])
    classifier.train(training)
    correct, seen = engine.sum(counts).tolist()
    if seen != len(reader.keys):
        raise CountError(f"an evaluation pass saw {seen} samples of {len(reader.keys)}")
    return float(correct / seen)


def evaluate(
    classifier: Classifier,
    methods: Mapping[str, Method],
    reader: Reader,
    *,
    size: int,
    batch_size: int,
    au_variant: Literal["official", "symmetric"],
    keys_sha256: str,
    engine: Engine,
    observer: Observer,
    label: str,
) -> dict[str, Rows]:
    """Rows of every cell, from one forward pass a sample.

    Args:
        classifier: in eval mode, on the engine's device.
        methods: name -> read-out, for all cells of the training.
        reader: the split.
        size: side of the network's input.
        batch_size: per process; no result depends on it.
        au_variant: geometry of the AU maps compared with.
        keys_sha256: what `hash_keys` of the split must be, from its index.
        engine: processes and device.
        observer: told of progress on the main process.
        label: of the work, for the observer.

    Returns:
        Name -> rows, complete on every process.

    Raises:
        CountError: a sample was missed or counted twice.
        StoppedError: between two batches, if this run was asked to stop.
        EverywhereError: with several processes, what went wrong on one of them.
    """
    assert not classifier.training
    expressions = expression_ids(reader.classes).to(engine.device)
    graph = any(method.needs_grad for method in methods.values())
    parts: list[dict[str, np.ndarray[Any, Any]]] = []
    if engine.is_main:
        observer.begin(label, steps=len(reader.keys), done=0)
    with engine.together(), contextlib.nullcontext() if graph else torch.inference_mode():
        for raw in reader.eval_batches(rank=engine.rank, world_size=engine.world_size, batch_size=batch_size):
            engine.stop.check()
            stored = raw.images.shape[-1]
            batch = raw.to(engine.device)
            images = eval_images(batch.images, size=size, mean=classifier.backbone.mean, std=classifier.backbone.std)
            # The frame for which the published pixel radii are meant, whatever the size of the network's input.
            landmarks = eval_landmarks(batch.landmarks, stored=stored, size=REFERENCE_FRAME)
            au_maps, valid = action_unit_maps(landmarks, expressions[batch.labels], frame=REFERENCE_FRAME, size=size, variant=au_variant)
            output = classifier(images)
            output.images = images
            check_finite(output.logits, label=label)
            columns = {"position": batch.positions, "label": batch.labels, "logits": output.logits, "au_valid": valid}
            for layer, features in output.layers.items():
                columns[f"attention/{layer}"] = _where(valid, attention_cosines(layer_attention(features.detach()), au_maps))
            predicted = output.logits.argmax(dim=1)
            for name, method in methods.items():
                for target, classes in (("true", batch.labels), ("predicted", predicted)):
                    columns[f"{target}/{name}"] = _where(valid, map_cosines(read_maps(method, classifier, output, classes), au_maps))
            parts.append({key: value.detach().cpu().numpy() for key, value in columns.items()})
            if engine.is_main:
                observer.advance(label, steps=len(raw) * engine.world_size, note="")
    if engine.is_main:
        observer.end(label)
    whole = [part for shares in engine.gather(parts) for part in shares]
    table = {key: np.concatenate([part[key] for part in whole]) for key in whole[0]}
    order = np.argsort(table["position"], kind="stable")
    table = {key: values[order] for key, values in table.items()}
    keys = [reader.keys[position] for position in table["position"]]
    if hash_keys(keys) != keys_sha256 or len(keys) != len(reader.keys):
        raise CountError(
            f"{label}: the evaluation saw {len(keys)} samples ({len(set(keys))} different) of {len(reader.keys)}; nothing is recorded"
        )
    layers = {int(key.removeprefix("attention/")): values for key, values in table.items() if key.startswith("attention/")}
    return {
        name: Rows(
            keys=keys,
            labels=table["label"],
            people=reader.people.numpy()[table["position"]],
            logits=table["logits"],
            au_valid=table["au_valid"],
            attention_cosines=layers,
            map_cosines_true=table[f"true/{name}"],
            map_cosines_predicted=table[f"predicted/{name}"],
        )
        for name in methods
    }


def _where(valid: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~valid, float("nan"))
