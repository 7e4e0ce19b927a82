"""The evaluation: every sample of a split on exactly one process, one pass for all cells of a training, no collective inside it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.au.codebook import REFERENCE_FRAME
from bench.au.maps import action_unit_maps, expression_ids
from bench.data.batch import RawBatch, Reader
from bench.data.index import hash_keys
from bench.evaluation.class_maps import AverageMaps, ClassSums, average_maps
from bench.evaluation.invariance import Slice, check_invariance
from bench.evaluation.maps import attention_cosines, cosines, enlarged, map_ranges, reference_landmarks, where_valid
from bench.evaluation.measures import NO_MEASURES, Choice, Explained, Measuring
from bench.evaluation.parts import combine, convert
from bench.evaluation.read_out import forward, grad_mode, network_input, read_out
from bench.evaluation.rows import Rows
from bench.method import Classifier, Method
from bench.runtime.engine import Engine
from bench.runtime.interruption import EverywhereError
from bench.runtime.observer import Observer, Work
from bench.training.guidance import layer_attention
from bench.training.trainer import peak_memory, reset_peak_memory


class CountError(EverywhereError):
    """A pass that did not see every sample exactly once. Samples are counted over all processes, so all of them raise it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The results of one cell."""

    rows: Rows
    maps: AverageMaps
    attention_layer: int
    """Layer whose attention is in ``maps``."""
    invariance: Mapping[str, Any]
    """Whether logits and maps depend on the batch, see `bench.evaluation.invariance.check_invariance`."""
    map_seconds_per_image: float
    """Seconds of one device to read one map of one picture off the network's output. The forward pass is not in it, and neither is
    what it costs to keep a graph: where a method of the same evaluation ``needs_grad``, the forward passes of all take longer."""
    peak_memory_bytes: int | None
    """Of the main process's device, for the evaluation of all methods; see `bench.training.trainer.peak_memory`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A method whose maps hold NaN or infinite values, so that its cell has no results."""

    reason: str
    """How many maps, and the first."""


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
            images = network_input(classifier, raw.images.to(engine.device), size=size)
            hits = forward(classifier, images, label="selection of the checkpoint").logits.argmax(dim=1) == raw.labels.to(engine.device)
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
    measures: Choice = NO_MEASURES,
) -> dict[str, Evaluated | Unusable]:
    """Results of every cell, from one forward pass a sample. Then the main process makes the invariance check; the rest wait for it.

    Args:
        classifier: in eval mode, on the engine's device.
        methods: name -> read-out, for all cells of the training.
        reader: the split.
        size: side of the network's input.
        batch_size: per process; no result depends on it.
        au_variant: geometry of the AU maps.
        attention_layer: layer whose average attention is kept.
        keys_sha256: what `hash_keys` of the split must be, from its index.
        engine: processes and device.
        observer: gets the progress of the main process.
        label: name of the training, for the observer and errors.
        measures: optional measures, see `bench.evaluation.measures.choice_of`.

    Returns:
        Name -> results, complete on every process; or `Unusable` where maps hold NaN or infinite values. In the variant
        ``official`` such maps count as zeros, as in the published code, and are counted.

    Raises:
        CountError: a sample was missed or counted twice.
        StoppedError: between two batches, if this run was asked to stop.
        EverywhereError: with several processes, what went wrong on one of them.
    """
    assert not classifier.training
    evaluation = _Evaluation(
        classifier,
        methods,
        reader,
        size=size,
        au_variant=au_variant,
        attention_layer=attention_layer,
        engine=engine,
        work=Work(label, "evaluating"),
        measuring=Measuring(measures, classifier, total=len(reader.keys)),
    )
    evaluation.run(batch_size=batch_size, observer=observer)
    return evaluation.results(keys_sha256=keys_sha256, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Samples:
    """Values of samples, by field of `Rows`: tensors of a batch, then arrays of the split on the host. The first axis is the sample."""

    positions: Any
    """In the split."""
    shared: Mapping[str, Any]
    """Fields with the same values for all methods."""
    of_method: Mapping[str, Mapping[str, Any]]
    """Method -> fields with values of its maps."""


class _Evaluation:
    """What one process computes of its batches, keeps of them, and in the end puts together with the results of all processes."""

    def __init__(
        self,
        classifier: Classifier,
        methods: Mapping[str, Method],
        reader: Reader,
        *,
        size: int,
        au_variant: Literal["official", "symmetric"],
        attention_layer: int,
        engine: Engine,
        work: Work,
        measuring: Measuring,
    ) -> None:
        self.classifier, self.methods, self.reader = classifier, methods, reader
        self.size, self.au_variant, self.attention_layer = size, au_variant, attention_layer
        self.engine, self.work, self.measuring = engine, work, measuring
        self.expressions = expression_ids(reader.classes).to(engine.device)
        self.attention_sums, self.au_sums, *map_sums = (
            ClassSums(reader.labels, num_classes=len(reader.classes), device=engine.device) for _ in range(2 + len(methods))
        )
        self.map_sums = dict(zip(methods, map_sums, strict=True))
        self.parts: list[_Samples] = []
        self.slice = Slice(len(reader.keys))
        self.watch = Stopwatch(engine.device)

    def run(self, *, batch_size: int, observer: Observer) -> None:
        """Compute all batches of this process."""
        engine = self.engine
        reset_peak_memory(engine.device)
        if engine.is_main:
            observer.begin(self.work, steps=len(self.reader.keys), done=0)
        with engine.together(), grad_mode(self.methods.values()):
            for raw in self.reader.eval_batches(rank=engine.rank, world_size=engine.world_size, batch_size=batch_size):
                engine.stop.check()
                self.add(raw)
                if engine.is_main:
                    observer.advance(self.work, steps=len(raw) * engine.world_size, note="")
        if engine.is_main:
            observer.end(self.work)

    def add(self, raw: RawBatch) -> None:
        """Compute a batch. Sums stay on the device; values of the samples go to the host at the end."""
        batch, size = raw.to(self.engine.device), self.size
        expressions = self.expressions[batch.labels]
        landmarks = reference_landmarks(batch.landmarks, stored=raw.images.shape[-1])
        au_maps, valid = action_unit_maps(landmarks, expressions, frame=REFERENCE_FRAME, size=size, variant=self.au_variant)
        images = network_input(self.classifier, batch.images, size=size)
        output = forward(self.classifier, images, label=str(self.work))
        predicted = output.logits.argmax(dim=1)
        attention = {layer: layer_attention(features.detach()) for layer, features in output.layers.items()}
        place = {"positions": batch.positions, "labels": batch.labels}
        self.au_sums.add(au_maps, **place, valid=valid)
        self.attention_sums.add(enlarged(attention[self.attention_layer], size=size), **place)
        explain = functools.partial(
            Explained,
            classifier=self.classifier,
            randomised=self.measuring.randomised,
            images=images,
            logits=output.logits.detach(),
            predicted=predicted,
            landmarks=landmarks,
            expressions=expressions,
            au_maps=au_maps,
            au_valid=valid,
            au_variant=self.au_variant,
        )
        maps: dict[str, Tensor] = {}
        of_method: dict[str, Mapping[str, Any]] = {}
        for name, method in self.methods.items():
            with self.watch.timing(name):
                maps[name] = read_out(method, self.classifier, output, batch.labels)
            of_predicted = read_out(method, self.classifier, output, predicted)
            map_true, map_predicted = enlarged(maps[name], size=size), enlarged(of_predicted, size=size)
            self.map_sums[name].add(map_true, **place)
            explained = explain(method=method, raw_predicted=of_predicted, map_true=map_true, map_predicted=map_predicted)
            of_method[name] = {
                "map_cosines_true": where_valid(valid, cosines(map_true, au_maps)),
                "map_cosines_predicted": where_valid(valid, cosines(map_predicted, au_maps)),
                "map_ranges_true": map_ranges(maps[name]),
                "map_ranges_predicted": map_ranges(of_predicted),
                "measures": self.measuring.measure(explained, positions=batch.positions),
            }
        self.slice.keep(raw, logits=output.logits, maps=maps)
        shared = {
            "labels": batch.labels,
            "logits": output.logits,
            "au_valid": valid,
            "attention_cosines": {layer: where_valid(valid, attention_cosines(values, au_maps)) for layer, values in attention.items()},
        }
        samples = _Samples(positions=batch.positions, shared=shared, of_method=of_method)
        self.parts.append(convert(samples, lambda values: values.detach().cpu().numpy()))

    def results(self, *, keys_sha256: str, batch_size: int) -> dict[str, Evaluated | Unusable]:
        """Results of the whole split on every process, see `evaluate`; all processes call this together."""
        engine = self.engine
        peak = engine.from_main(peak_memory(engine.device))
        samples = self._all_samples(keys_sha256)
        keys = [self.reader.keys[position] for position in samples.positions]
        unusable = {name: problem for name in self.methods if (problem := self._not_finite(samples, name)) is not None}
        usable = {name: method for name, method in self.methods.items() if name not in unusable}
        shares = engine.gather(self.slice.parts)
        with engine.together():
            checked = None
            if engine.is_main:
                whole = Slice.join([part for share in shares for part in share])
                checked = check_invariance(self.classifier, usable, whole, size=self.size, batch_size=batch_size, engine=engine)
        invariance = engine.from_main(checked)
        assert invariance is not None
        attention, au_map = self.attention_sums.total(engine), self.au_sums.total(engine)
        spent = engine.gather(self.watch.seconds())
        people = self.reader.people.numpy()[samples.positions]
        results = {
            name: Evaluated(
                rows=Rows(keys=keys, people=people, **samples.shared, **samples.of_method[name]),
                attention_layer=self.attention_layer,
                maps=average_maps(self.map_sums[name].total(engine), attention=attention, au_map=au_map),
                invariance=invariance[name],
                map_seconds_per_image=sum(share[name] for share in spent) / len(keys),
                peak_memory_bytes=peak,
            )
            for name in usable
        }
        return {name: results[name] if name in results else unusable[name] for name in self.methods}

    def _all_samples(self, keys_sha256: str) -> _Samples:
        """The samples of all processes, in the order of the split.

        Raises:
            CountError: these are not the samples of the split.
        """
        parts = [part for share in self.engine.gather(self.parts) for part in share]
        order = np.argsort(np.concatenate([part.positions for part in parts]), kind="stable")
        samples = combine(parts, lambda arrays: np.concatenate(arrays)[order])
        keys, expected = [self.reader.keys[position] for position in samples.positions], len(self.reader.keys)
        if hash_keys(keys) != keys_sha256 or len(keys) != expected:
            raise CountError(
                f"{self.work}: the evaluation saw {len(keys)} samples ({len(set(keys))} different) of {expected}; nothing is recorded"
            )
        return samples

    def _not_finite(self, samples: _Samples, name: str) -> Unusable | None:
        """Why the maps of a method cannot be used, or None."""
        true, predicted = (np.isnan(samples.of_method[name][field]) for field in ("map_ranges_true", "map_ranges_predicted"))
        bad = true | predicted
        if self.methods[name].variant == "official" or not bad.any():
            return None
        first = int(bad.argmax())
        label = samples.shared["labels"][first] if true[first] else int(samples.shared["logits"][first].argmax())
        return Unusable(
            reason=f"maps of {int(bad.sum())} of {len(bad)} samples hold NaN or infinite values, the first that of sample "
            f"{self.reader.keys[samples.positions[first]]} for class {self.reader.classes[label]!r}: no figure can be taken from them, "
            "so the cell has none"
        )


def count_macs(classifier: Classifier, *, size: int, device: torch.device) -> int:
    """Multiply-accumulates of one forward pass of one picture: convolutions, matrix products and attention, half of PyTorch's flops.

    Additions of biases, normalisations, activations and poolings are not counted, nor what a read-out does with the output.
    """
    image = torch.zeros(1, 3, size, size, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        classifier(image)
    return int(counter.get_total_flops()) // 2


class Stopwatch:
    """Sums of seconds by name of the work, on a GPU too. It waits for the GPU only when the sums are read."""

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
