"""Try every network of a plan: a step of training and a reading of two made-up pictures. Errors appear before hours of training."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from bench.backbone import BACKBONES
from bench.config import ConfigError
from bench.dataset import EXPRESSIONS
from bench.draws import drawing
from bench.evaluation.contract import check_output
from bench.evaluation.maps import map_ranges
from bench.evaluation.read_out import grad_mode, read_out
from bench.matrix import Cell, Planned, Training
from bench.method import METHODS, Batch, Classifier, Output
from bench.training.build import build_classifier, build_method, build_reader
from bench.training.task import GuidanceTerm, TrainingTask, guided_share
from bench.weights import without_loading

PICTURES = 2
"""The fewest that batch statistics allow."""
GRID = 28
"""Side of the made-up AU maps."""

LARGEST = 300_000_000
"""Most parameters of a network that is tried: the machine that makes the plan may be too small for a larger network."""

_log = logging.getLogger(__name__)

_passed: set[tuple[object, ...]] = set()
"""What has been tried in this process. A run makes its plan again when its data are prepared."""


def try_out(plan: Iterable[tuple[Planned, int]]) -> None:
    """Train each different network of a plan for one step, and read the maps of all its cells: on the CPU, with two pictures of noise.

    Args:
        plan: trainings with the cells they serve, and the number of classes of their data.

    Raises:
        ConfigError: everything that fails, and what of the plan works.
        FileNotFoundError: missing pretrained weights.
    """
    problems: dict[str, str] = {}
    works: list[str] = []
    # Guided trainings come first: they do all that unguided trainings do, which then need no trial.
    for (training, cells), num_classes in sorted(plan, key=lambda entry: entry[0].training.guidance == "none"):
        identities = {_identity(training, cell, num_classes): cell for cell in cells}
        new = tuple(cell for identity, cell in identities.items() if not {identity, (*identity[:-1], True)} & _passed)
        failed = {method: text for method, text in _try(training, new, num_classes=num_classes).items() if text} if new else {}
        for identity, cell in identities.items():
            name = f"{cell.method} on {training.backbone}"
            if cell.method in failed:
                problems.setdefault(name, failed[cell.method])
            else:
                works.append(name)
                _passed.add(identity)
    if problems:
        lines = [f"{name}: {text}" for name, text in problems.items()]
        possible = f"\nThese pairs of the plan work: {', '.join(dict.fromkeys(works))}" if works else ""
        raise ConfigError("\n".join(lines) + possible)


def outline(training: Training) -> Classifier:
    """The network of a training, without memory for its weights and without loading them.

    Raises:
        ConfigError: an option or image size that the network refuses.
    """
    try:
        with torch.device("meta"), without_loading():
            return build_classifier(training, num_classes=len(EXPRESSIONS))
    except ValueError as error:
        raise ConfigError(f"{training.trains_as} on {training.backbone}: {error}") from error


def _identity(training: Training, cell: Cell, num_classes: int) -> tuple[object, ...]:
    """What decides the outcome of a trial; the last value says whether it is guided. Types too: a plugin may register a name again."""
    settings = [training.method_options, training.backbone_options, training.settings["images"], cell.method_options]
    targets = (METHODS.get(cell.method).target, METHODS.get(training.trains_as).target, BACKBONES.get(training.backbone).target)
    return (*targets, training.backbone, training.variant, num_classes, repr(settings), training.guidance != "none")


def _try(training: Training, cells: Iterable[Cell], *, num_classes: int) -> Mapping[str, str]:
    """Method -> what is wrong, empty if it works."""
    parameters = sum(parameter.numel() for parameter in outline(training).parameters())
    pretrained = training.backbone_options.get("weights", "random") != "random"
    try:
        classifier = build_classifier(training, num_classes=num_classes) if parameters <= LARGEST or pretrained else None
    except ValueError as error:
        raise ConfigError(f"{training.trains_as} on {training.backbone}: {error}") from error
    if parameters > LARGEST or classifier is None:
        _log.info("%s has %.0f million parameters: it is not tried before the run", training.backbone, parameters / 1e6)
        return {cell.method: "" for cell in cells}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        side = int(training.settings["images"]["size"])
        batch = Batch(
            positions=torch.arange(PICTURES),
            seeds=torch.arange(PICTURES),
            images=torch.randn(PICTURES, 3, side, side),
            labels=torch.arange(PICTURES) % num_classes,
            au_maps=torch.rand(PICTURES, GRID, GRID),
            au_valid=torch.ones(PICTURES, dtype=torch.bool),
        )
        try:
            _step(training, classifier, batch, num_classes=num_classes)
        except Exception as error:  # noqa: BLE001 - an entry's own code can raise anything
            return {cell.method: f"one step of training fails: {_words(error)}" for cell in cells}
        return {cell.method: _read(cell, classifier, batch, num_classes=num_classes) for cell in cells}


def _step(training: Training, classifier: Classifier, batch: Batch, *, num_classes: int) -> None:
    """A training step as `bench.training.trainer` makes it, without the optimiser."""
    method, guidance = build_method(training), training.settings.get("guidance")
    term = GuidanceTerm(weight=guidance["weight"], layers=tuple(guidance["layers"])) if guidance else None
    task = TrainingTask(classifier.train(), method, term)
    batch = method.mix(batch)
    with torch.enable_grad(), drawing(seed=0, step=0, samples=batch.seeds):
        outputs: list[Output] = []
        hook = classifier.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            result = task(batch, guided_share(PICTURES, parts=1))
        finally:
            hook.remove()
            if outputs:  # the contract's message is clearer than the error of the loss
                check_output(outputs[0], classifier, samples=PICTURES, num_classes=num_classes)
        loss = result["loss"]
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss is {float(loss)}")
        loss.backward()


def _read(cell: Cell, classifier: Classifier, batch: Batch, *, num_classes: int) -> str:
    """Read maps as the evaluation does; returns what is wrong, empty if it works."""
    method = build_reader(cell).for_trial()
    classifier.eval()
    try:
        with grad_mode([method]):
            output = classifier(batch.images)
            check_output(output, classifier, samples=PICTURES, num_classes=num_classes)
            output.images = batch.images
            maps = read_out(method, classifier, output, batch.labels)
        if method.variant != "official" and bool(map_ranges(maps).isnan().any()):
            return "its maps hold NaN or infinite values"
    except Exception as error:  # noqa: BLE001 - an entry's own code can raise anything
        return f"its maps cannot be read: {_words(error)}"
    return ""


def _words(error: Exception) -> str:
    """The first line of an error, with its type unless the message is made for users."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return text if isinstance(error, ValueError | NotImplementedError) else f"{type(error).__name__}: {text}"
