from __future__ import annotations

import pytest

from bench.config import ConfigError, load_settings
from bench.matrix import DatasetRef, build_matrix, check_world
from bench.method import METHODS
from bench.methods.cam import CAM
from bench.registry import Default


def ref(name="synthetic", fingerprint="f", train=4096):
    return DatasetRef(name=name, entry="synthetic", fingerprint=fingerprint, samples={"train": train, "val": 10, "test": 10})


def matrix(refs=None, **flags):
    settings = load_settings(environ={}, flags={"run.methods": ["cam"], **{k.replace("__", "."): v for k, v in flags.items()}})
    return build_matrix(settings, refs or {"synthetic": ref()})


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def posthoc():
    METHODS.register("posthoc-test", title="P", kind="posthoc", trains_as="cam")(type("P", (CAM,), {}))
    yield "posthoc-test"
    METHODS._entries.pop("posthoc-test")


def test_cells_are_the_product_of_all_axes():
    made = matrix(
        {"synthetic": ref(), "b": ref("b", "g")},
        run__datasets=["synthetic", "b"],
        run__backbones=["mini", "resnet18"],
        run__seeds=[0, 1, 2],
    )
    assert len(made.cells) == 2 * 2 * 2 * 3
    assert len({cell.key for cell in made.cells}) == len({cell.path for cell in made.cells}) == 24


def test_post_hoc_cells_share_a_training(posthoc):
    made = matrix(run__methods=["cam", posthoc], run__seeds=[0, 1])
    assert (len(made.cells), len(made.trainings)) == (8, 4)
    assert {len(cells) for _, cells in made.trainings} == {2}


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("train__lr", 0.1),
        ("train__batch_size", 32),
        ("augment__flip_p", 0.1),
        ("images__size", 96),
        ("run__protocol", "test-selected"),
        ("run__variant", "official"),
    ],
)
def test_what_can_change_the_weights_changes_the_key(flag, value):
    assert matrix().cells[0].training.key != matrix(**{flag: value}).cells[0].training.key


@pytest.mark.parametrize(
    ("flag", "value"), [("loader__workers", 7), ("evaluation__batch_size", 3), ("train__checkpoint_minutes", 3.0), ("run__results", "x")]
)
def test_what_cannot_change_the_weights_does_not_change_the_key(flag, value):
    assert matrix().cells[0].key == matrix(**{flag: value}).cells[0].key


def test_guidance_settings_concern_guided_trainings_only():
    (plain, guided), (plain2, guided2) = matrix().cells, matrix(guidance__weight=4.0).cells
    assert plain.training.key == plain2.training.key
    assert guided.training.key != guided2.training.key


def test_the_evaluation_is_part_of_the_cell_but_not_of_the_training():
    a, b = matrix().cells[0], matrix(evaluation__au_maps="official").cells[0]
    assert a.training.key == b.training.key
    assert a.key != b.key


def test_other_data_is_another_training():
    assert matrix().cells[0].training.key != matrix({"synthetic": ref(fingerprint="other")}).cells[0].training.key


def test_seeds_depend_on_seed_and_role_alone():
    none, au = (cell.training for cell in matrix().cells)
    assert none.derived_seed("data") == au.derived_seed("data")
    assert none.derived_seed("data") != none.derived_seed("init")
    assert none.derived_seed("data") != matrix(run__seeds=[1]).cells[0].training.derived_seed("data")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"run__methods": ["cma"]}, r"--methods: unknown method 'cma'\. Did you mean 'cam'"),
        ({"run__backbones": ["resnet5"]}, r"--backbones: unknown backbone 'resnet5'\. Did you mean 'resnet50'"),
        ({"methods": {"cam": {"x": 1}}}, r"method 'cam' has no option 'x'"),
        ({"backbones": {"resnet50": {"large_map": True}}}, r"backbone 'resnet50' has no option 'large_map'\. Did you mean 'large_maps'"),
        ({"backbones": {"resnet50": {"large_maps": "perhaps"}}}, r"option large_maps = 'perhaps'"),
        ({"methods": {"cma": {"x": 1}}}, r"unknown method 'cma' in \[methods\.cma\]\. Did you mean 'cam'"),
    ],
)
def test_what_does_not_exist_is_an_error_with_the_nearest_that_does(flags, message):
    with pytest.raises(ConfigError, match=message):
        matrix(**flags)


def test_a_batch_larger_than_the_training_split_is_an_error():
    with pytest.raises(
        ConfigError, match=r"train\.batch_size = 224 is more than the 100 training samples of synthetic; try --set train\.batch_size=25"
    ):
        matrix({"synthetic": ref(train=100)})


def test_a_method_without_a_backbone_it_can_take_is_an_error_that_lists_the_possible():
    METHODS.register("vit-test", title="V", kind="trained", backbones=("vit",))(type("V", (CAM,), {}))
    try:
        with pytest.raises(ConfigError, match=r"method 'vit-test' can take none of the backbones resnet50; it can take"):
            matrix(run__methods=["vit-test"])
    finally:
        METHODS._entries.pop("vit-test")


def test_a_batch_that_does_not_divide_is_an_error_with_the_nearest_that_do():
    settings = load_settings(environ={}, flags={"train.batch_size": 224})
    check_world(settings.config, 2)
    with pytest.raises(ConfigError, match="nearest that do are 222 or 225"):
        check_world(settings.config, 3)


@pytest.fixture
def opinionated():
    METHODS.register(
        "opinion-test",
        title="O",
        kind="trained",
        defaults=(
            Default("train.lr", 0.5, None, "our choice"),
            Default("train.lr", 0.25, "synthetic", "Table 9"),
            Default("train.epochs", 3, "rafdb", "Table 9"),
            Default("guidance.layers", [4], None, "eval.py", "official"),
        ),
    )(type("O", (CAM,), {}))
    yield "opinion-test"
    METHODS._entries.pop("opinion-test")


def test_what_a_method_brings_along_fills_only_what_nobody_has_said(opinionated):
    training = matrix(run__methods=[opinionated]).cells[0].training
    assert training.settings["train"]["lr"] == 0.25
    assert training.settings["train"]["epochs"] == 20
    assert training.brought == {"train.lr": "opinion-test: Table 9"}
    assert matrix(run__methods=[opinionated], train__lr=0.125).cells[0].training.settings["train"]["lr"] == 0.125


def test_what_is_brought_along_for_a_variant_concerns_that_variant_only(opinionated):
    assert matrix(run__methods=[opinionated]).cells[1].training.settings["guidance"]["layers"] == [5]
    assert matrix(run__methods=[opinionated], run__variant="official").cells[1].training.settings["guidance"]["layers"] == [4]


def test_eleven_methods_with_and_without_guidance_are_sixteen_trainings_not_twenty_two():
    settings = load_settings(environ={}, profile="quick", flags={"run.methods": ["all"], "run.seeds": [0]})
    made = build_matrix(settings, {"synthetic": ref()})
    built_in = [cell for cell in made.cells if METHODS.get(cell.method).target.__module__.startswith("bench.methods")]
    assert len({cell.method for cell in built_in}) == 11
    assert (len(built_in), len({cell.training.key for cell in built_in})) == (22, 16)


def test_everything_has_the_rows_that_all_leaves_out():
    rows = {
        which: {cell.method for cell in matrix(run__methods=[which], run__backbones=["mini", "mini-vit", "mini-apvit"]).cells}
        for which in ("all", "everything")
    }
    more = {"hirescam", "xgradcam", "eigencam", "scorecam", "ablationcam", "smoothgradcampp", "finercam", "rollout", "legrad"}
    assert more <= rows["everything"] - rows["all"]
