"""The evaluation: every sample of a split on exactly one process, one pass for all cells of a training, no collective inside it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import action_unit_maps, expression_ids
from bench.data.batch import Reader
from bench.data.index import hash_keys
from bench.data.transforms import eval_images, eval_landmarks
from bench.evaluation.class_maps import AverageMaps, ClassSums, average_maps
from bench.evaluation.invariance import Slice, check_invariance, join
from bench.evaluation.maps import attention_cosines, check_finite, map_cosines, map_ranges, min_max, read_maps, upsample
from bench.evaluation.measures import Choice, Explained, Measuring
from bench.evaluation.rows import Rows
from bench.method import Classifier, Method
from bench.runtime.engine import Engine
from bench.runtime.interruption import EverywhereError
from bench.runtime.observer import Observer, Work
from bench.training.guidance import layer_attention
from bench.training.trainer import peak_memory, reset_peak_memory


class CountError(EverywhereError):
    """A pass that did not see every sample exactly once: counted over all processes, so all of them raise it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What one evaluation found about one cell."""

    rows: Rows
    maps: AverageMaps
    attention_layer: int
    """Of which ``maps`` has the attention."""
    invariance: Mapping[str, Any]
    """Whether logits and maps depend on the batch, see `bench.evaluation.invariance.check_invariance`."""
    map_seconds_per_image: float
    """Of one device, for one map of each picture: reading it off the network's output, which is there already. What it costs to keep a
    graph is not in it: where a method of the same evaluation ``needs_grad``, the forward passes of all take longer."""
    peak_memory_bytes: int | None
    """Of the main process's device, with all that its evaluation holds, for all methods; see `bench.training.trainer.peak_memory`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A read-out that gave maps from which no figure can be taken."""

    reason: str
    """How many, and the first."""


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
    attention_layer: int,
    keys_sha256: str,
    engine: Engine,
    observer: Observer,
    label: str,
    measures: Choice | None = None,
) -> dict[str, Evaluated | Unusable]:
    """Results of every cell, from one forward pass a sample; then the invariance check, for which the other processes wait.

    Args:
        classifier: in eval mode, on the engine's device.
        methods: name -> read-out, for all cells of the training.
        reader: the split.
        size: side of the network's input.
        batch_size: per process; no result depends on it.
        au_variant: geometry of the AU maps compared with.
        attention_layer: of which average maps are kept.
        keys_sha256: what `hash_keys` of the split must be, from its index.
        engine: processes and device.
        observer: told of progress on the main process.
        label: of the training, for the observer and errors.
        measures: optional measures to take besides, see `bench.evaluation.measures.choice_of`.

    Returns:
        Name -> results, complete on every process; or why there are none, where maps hold NaN or infinite values. In the variant
        ``official`` such maps count as zeros, as in the published code, and are counted.

    Raises:
        CountError: a sample was missed or counted twice.
        StoppedError: between two batches, if this run was asked to stop.
        EverywhereError: with several processes, what went wrong on one of them.
    """
    assert not classifier.training
    work = Work(label, "evaluating")
    expressions = expression_ids(reader.classes).to(engine.device)
    graph = any(method.needs_grad for method in methods.values())
    parts: list[_Part] = []
    measuring = Measuring(measures, classifier, total=len(reader.keys)) if measures is not None and measures.names else None
    kept = Slice(len(reader.keys))
    attention_sums, au_sums, *map_sums = (
        ClassSums(reader.labels, num_classes=len(reader.classes), device=engine.device) for _ in range(2 + len(methods))
    )
    sums = dict(zip(methods, map_sums, strict=True))
    watch = Stopwatch(engine.device)
    reset_peak_memory(engine.device)
    if engine.is_main:
        observer.begin(work, steps=len(reader.keys), done=0)
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
            check_finite(output.logits, label=str(work))
            attention_rows = {
                layer: _where(valid, attention_cosines(layer_attention(features.detach()), au_maps))
                for layer, features in output.layers.items()
            }
            true_rows: dict[str, Tensor] = {}
            predicted_rows: dict[str, Tensor] = {}
            true_ranges: dict[str, Tensor] = {}
            predicted_ranges: dict[str, Tensor] = {}
            measured: dict[str, dict[str, Tensor]] = {name: {} for name in methods}
            where = {"positions": batch.positions, "labels": batch.labels}
            au_sums.add(au_maps, **where, valid=valid)
            attention_sums.add(upsample(min_max(layer_attention(output.layers[attention_layer].detach())), size=size), **where)
            predicted = output.logits.argmax(dim=1)
            own: dict[str, Tensor] = {}
            for name, method in methods.items():
                with watch.timing(name):
                    own[name] = read_maps(method, classifier, output, batch.labels)
                grown = upsample(min_max(own[name]), size=size)
                sums[name].add(grown, **where)
                true_rows[name] = _where(valid, map_cosines(own[name], au_maps))
                true_ranges[name] = map_ranges(own[name])
                guessed = read_maps(method, classifier, output, predicted)
                predicted_rows[name] = _where(valid, map_cosines(guessed, au_maps))
                predicted_ranges[name] = map_ranges(guessed)
                if measuring is not None:
                    seen = Explained(
                        method=method,
                        classifier=classifier,
                        randomised=measuring.randomised,
                        images=images,
                        logits=output.logits.detach(),
                        predicted=predicted,
                        raw_predicted=guessed,
                        map_true=grown,
                        map_predicted=upsample(min_max(guessed), size=size),
                        landmarks=landmarks,
                        expressions=expressions[batch.labels],
                        au_maps=au_maps,
                        au_valid=valid,
                        au_variant=au_variant,
                    )
                    measured[name] = dict(measuring.measure(seen, positions=batch.positions))
            kept.keep(raw, logits=output.logits, maps=own)
            parts.append(
                _Part(
                    position=_to_host(batch.positions),
                    label=_to_host(batch.labels),
                    logits=_to_host(output.logits),
                    au_valid=_to_host(valid),
                    attention={layer: _to_host(values) for layer, values in attention_rows.items()},
                    maps_true={name: _to_host(values) for name, values in true_rows.items()},
                    maps_predicted={name: _to_host(values) for name, values in predicted_rows.items()},
                    ranges_true={name: _to_host(values) for name, values in true_ranges.items()},
                    ranges_predicted={name: _to_host(values) for name, values in predicted_ranges.items()},
                    measures={name: {key: _to_host(values) for key, values in table.items()} for name, table in measured.items()},
                )
            )
            if engine.is_main:
                observer.advance(work, steps=len(raw) * engine.world_size, note="")
    if engine.is_main:
        observer.end(work)
    peak = engine.from_main(peak_memory(engine.device))
    whole = _join_parts([part for shares in engine.gather(parts) for part in shares])
    keys = [reader.keys[position] for position in whole.position]
    if hash_keys(keys) != keys_sha256 or len(keys) != len(reader.keys):
        raise CountError(
            f"{work}: the evaluation saw {len(keys)} samples ({len(set(keys))} different) of {len(reader.keys)}; nothing is recorded"
        )
    unusable = {
        name: _not_finite(whole, name, keys=keys, classes=reader.classes)
        for name, method in methods.items()
        if method.variant != "official" and np.isnan([whole.ranges_true[name], whole.ranges_predicted[name]]).any()
    }
    usable = {name: method for name, method in methods.items() if name not in unusable}
    slices = [part for share in engine.gather(kept.parts) for part in share]
    with engine.together():
        checked = (
            check_invariance(classifier, usable, join(slices), size=size, batch_size=batch_size, engine=engine) if engine.is_main else None
        )
    invariance = engine.from_main(checked)
    assert invariance is not None
    attention, au = attention_sums.total(engine), au_sums.total(engine)
    spent = engine.gather(watch.seconds())
    results = {
        name: Evaluated(
            rows=Rows(
                keys=keys,
                labels=whole.label,
                people=reader.people.numpy()[whole.position],
                logits=whole.logits,
                au_valid=whole.au_valid,
                attention_cosines=whole.attention,
                map_cosines_true=whole.maps_true[name],
                map_cosines_predicted=whole.maps_predicted[name],
                map_ranges_true=whole.ranges_true[name],
                map_ranges_predicted=whole.ranges_predicted[name],
                measures=whole.measures[name],
            ),
            attention_layer=attention_layer,
            maps=average_maps(sums[name].total(engine), attention=attention, au_map=au),
            invariance=invariance[name],
            map_seconds_per_image=sum(share[name] for share in spent) / len(keys),
            peak_memory_bytes=peak,
        )
        for name in usable
    }
    return {name: results[name] if name in results else unusable[name] for name in methods}


def _not_finite(whole: _Part, name: str, *, keys: Sequence[str], classes: Sequence[str]) -> Unusable:
    true, predicted = np.isnan(whole.ranges_true[name]), np.isnan(whole.ranges_predicted[name])
    bad = true | predicted
    first = int(bad.argmax())
    of_class = classes[whole.label[first] if true[first] else int(whole.logits[first].argmax())]
    return Unusable(
        reason=f"maps of {int(bad.sum())} of {len(keys)} samples hold NaN or infinite values, the first that of sample {keys[first]} for "
        f"class {of_class!r}: no figure can be taken from them, so the cell has none"
    )


def count_macs(classifier: Classifier, *, size: int, device: torch.device) -> int:
    """Multiply-accumulates of one forward pass of one picture: convolutions, matrix products and attention, half of PyTorch's flops.

    Additions of biases, normalisations, activations and poolings are not counted, nor what a read-out does with the output.
    """
    image = torch.zeros(1, 3, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier(image)
    return int(counter.get_total_flops()) // 2


_Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Values of some samples, on the host: the first axis of every array is the sample."""

    position: _Array
    """In the split."""
    label: _Array
    logits: _Array
    au_valid: _Array
    attention: dict[int, _Array]
    """Layer -> cosines of its attention with the AU maps."""
    maps_true: dict[str, _Array]
    """Method -> cosines of the true class's maps."""
    maps_predicted: dict[str, _Array]
    ranges_true: dict[str, _Array]
    """Method -> `bench.evaluation.maps.map_ranges` of the true class's maps."""
    ranges_predicted: dict[str, _Array]
    measures: dict[str, dict[str, _Array]]
    """Method -> column of the optional measures -> values."""


def _join_parts(parts: Sequence[_Part]) -> _Part:
    """All samples in the order of their positions. Every part has the layers, methods and columns of the first."""
    order = np.argsort(np.concatenate([part.position for part in parts]), kind="stable")

    def sort(arrays: Sequence[_Array]) -> _Array:
        return np.concatenate(arrays)[order]

    first = parts[0]
    return _Part(
        position=sort([part.position for part in parts]),
        label=sort([part.label for part in parts]),
        logits=sort([part.logits for part in parts]),
        au_valid=sort([part.au_valid for part in parts]),
        attention={layer: sort([part.attention[layer] for part in parts]) for layer in first.attention},
        maps_true={name: sort([part.maps_true[name] for part in parts]) for name in first.maps_true},
        maps_predicted={name: sort([part.maps_predicted[name] for part in parts]) for name in first.maps_predicted},
        ranges_true={name: sort([part.ranges_true[name] for part in parts]) for name in first.ranges_true},
        ranges_predicted={name: sort([part.ranges_predicted[name] for part in parts]) for name in first.ranges_predicted},
        measures={
            name: {column: sort([part.measures[name][column] for part in parts]) for column in columns}
            for name, columns in first.measures.items()
        },
    )


def _to_host(values: Tensor) -> _Array:
    array: _Array = values.detach().cpu().numpy()
    return array


class Stopwatch:
    """Seconds of named work, of the device's own too, without a wait for the device until the sums are asked for."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing measured on ``device``."""
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[Callable[[], float]]] = {}

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time of the work inside to ``name``."""
        spans = self._spans.setdefault(name, [])
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            spans.append(lambda: float(begin.elapsed_time(end)) / 1000)
        else:
            started = time.perf_counter()
            yield
            seconds = time.perf_counter() - started
            spans.append(lambda: seconds)

    def seconds(self) -> dict[str, float]:
        """Sums by name. On a GPU this waits for the work to end, once."""
        if self._cuda:
            torch.cuda.synchronize()
        return {name: sum(span() for span in spans) for name, spans in self._spans.items()}


def _where(valid: Tensor, values: Tensor) -> Tensor:
    return values.masked_fill(~valid, float("nan"))
