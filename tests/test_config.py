from __future__ import annotations

from pathlib import Path

import pytest

from bench.config import Config, ConfigError, load_settings, walk


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    path = Path("bench.toml")
    path.write_text(text)
    return path


def test_without_anything_every_value_is_a_default():
    settings = load_settings(environ={})
    assert settings.config == Config()
    assert {origin.layer for origin in settings.origins.values()} == {"default"}


def test_every_value_has_an_origin():
    settings = load_settings(environ={}, profile="quick")
    assert {key for key, _ in walk(settings.config.model_dump(mode="json"))} == set(settings.origins)


def test_layers_win_in_order_and_say_so():
    write("[train]\nepochs = 2\nlr = 0.02\nmomentum = 0.2\nweight_decay = 0.2\n[profiles.quick.train]\nlr = 0.03\n")
    settings = load_settings(
        profile="quick",
        environ={"BENCH_TRAIN__MOMENTUM": "0.4", "BENCH_TRAIN__WEIGHT_DECAY": "0.4"},
        sets=["train.weight_decay=0.5", "run.seeds=[5]"],
        flags={"run.seeds": [6]},
    )
    train = settings.config.train
    assert train.batch_size == 32
    assert settings.origin("train.batch_size").text == "shipped profile quick"
    assert (train.epochs, settings.origin("train.epochs").text) == (2, "bench.toml")
    assert (train.lr, settings.origin("train.lr").text) == (0.03, "bench.toml [profiles.quick]")
    assert (train.momentum, settings.origin("train.momentum").text) == (0.4, "environment BENCH_TRAIN__MOMENTUM")
    assert (train.weight_decay, settings.origin("train.weight_decay").text) == (0.5, "--set train.weight_decay=0.5")
    assert (settings.config.run.seeds, settings.origin("run.seeds").text) == ((6,), "--seeds")


def test_the_file_can_choose_its_profile():
    write('profile = "mine"\n[profiles.mine.train]\nepochs = 3\n')
    assert load_settings(environ={}).config.train.epochs == 3


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_shipped_profiles_are_valid(profile):
    load_settings(environ={}, profile=profile)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nepoch = 3\n", r"bench\.toml: unknown key 'train\.epoch'\. Did you mean 'epochs'"),
        ("[trian]\nepochs = 3\n", r"bench\.toml: unknown key 'trian'\. Did you mean 'train'"),
        ('[train]\nlr = "fast"\n', r"bench\.toml: train\.lr = 'fast'"),
        ("[train]\nlr = -1\n", r"bench\.toml: train\.lr = -1"),
        ('[train]\noptimizer = "sdg"\n', r"train\.optimizer = 'sdg': input should be 'sgd' or 'adamw'"),
        ('[run]\nguidance = ["nonne"]\n', r"bench\.toml: run\.guidance = \['nonne'\]"),
        ("[run]\nseeds = [0, 0]\n", r"seeds: 0 is listed more than once"),
        ("[run]\nmethods = []\n", r"methods: empty list"),
        (
            "[train]\nbatch_size = 10\naccumulate = 3\n",
            r"batch_size = 10 is not a multiple of accumulate = 3 \(train\.batch_size from bench\.toml",
        ),
        ("[augment]\ncrop_scale = [0.9, 0.8]\n", r"crop_scale: the first value"),
        ("train = 3\n", r"bench\.toml: train = 3"),
        ("[train\n", r"bench\.toml: not valid TOML"),
        ('profile = "qiuck"\n', r"unknown profile 'qiuck'\. Did you mean 'quick'"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_file_key_value_and_the_nearest_choice(text, message):
    write(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(environ={})


def test_values_that_contradict_each_other_are_shown_with_their_origins_and_no_others_are():
    write("[train]\nmin_lr = 1\nepochs = 3\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={"BENCH_TRAIN__LR": "0.5", "BENCH_TRAIN__HEAD_LR_RATIO": "2"})
    assert str(caught.value).endswith("(train.min_lr from bench.toml; train.lr from environment BENCH_TRAIN__LR)")


@pytest.mark.parametrize(
    ("sets", "shown"),
    [
        (["train.min_lr=1"], "(train.min_lr from --set train.min_lr=1; train.lr from default)"),
        (["slurm.extra.time=3"], "(slurm.extra.time from --set slurm.extra.time=3)"),
        (["slurm.minutes=1"], "(slurm.signal_seconds from default; slurm.minutes from --set slurm.minutes=1)"),
    ],
)
def test_a_contradiction_names_its_keys_also_below_tables_and_where_a_default_takes_part(sets, shown):
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={}, sets=sets)
    assert str(caught.value).endswith(shown)


def test_a_bad_environment_variable_is_named():
    with pytest.raises(ConfigError, match=r"environment BENCH_TRAIN__EPOCS: unknown key 'train.epocs'. Did you mean 'epochs'"):
        load_settings(environ={"BENCH_TRAIN__EPOCS": "3"})


def test_a_set_without_a_value_is_an_error():
    with pytest.raises(ConfigError, match="write it as key=value"):
        load_settings(environ={}, sets=["train.lr"])


def test_a_missing_file_is_an_error():
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(environ={}, file=Path("nowhere.toml"))


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_settings(environ={}).config.train.epochs = 3


def value(key, *sets, **more):
    node = load_settings(sets=sets, environ={}, **more).config
    for part in key.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run.seeds=3", (3,)),
        ("run.seeds=0,1", (0, 1)),
        ("run.seeds=0-4", (0, 1, 2, 3, 4)),
        ("run.seeds=[0, 2]", (0, 2)),
        ("run.guidance=none", ("none",)),
        ("run.guidance=au,none", ("au", "none")),
        ("run.methods=cam, prm", ("cam", "prm")),
        ("run.methods=['cam']", ("cam",)),
        ("guidance.layers=3,5", (3, 5)),
        ("augment.crop_scale=0.5,1", (0.5, 1.0)),
        ("evaluation.measures=au,road", ("au", "road")),
    ],
)
def test_a_list_is_typed_as_for_the_flags(text, expected):
    assert value(text.partition("=")[0], text) == expected
    name = "BENCH_" + text.partition("=")[0].upper().replace(".", "__")
    assert load_settings(environ={name: text.partition("=")[2]}).config == load_settings(sets=[text], environ={}).config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slurm.extra.reservation=2024_01", "2024_01"),
        ("slurm.extra.begin=16:00:00", "16:00:00"),
        ("slurm.extra.nice=007", "007"),
        ("slurm.extra.exclusive=true", True),
        ("slurm.account=2024", "2024"),
        ("slurm.account='None'", "None"),
        ("slurm.account=None", None),
        ("run.results=2024-05-01", Path("2024-05-01")),
        ("datasets.faces.raw=2024-05-01", "2024-05-01"),
        ("datasets.faces.salt=2024_01", "2024_01"),
        ("datasets.faces.size=64", 64),
        ("train.lr=0.01", 0.01),
        ("train.tf32=true", True),
    ],
)
def test_a_text_stays_a_text_and_a_number_a_number(text, expected):
    parsed = value(text.partition("=")[0], text)
    assert (parsed, type(parsed)) == (expected, type(expected))


def test_a_range_that_is_none_names_its_origin():
    with pytest.raises(ConfigError, match=r"--set run\.seeds=4-1: '4-1' is not a whole number or a range; write 0,1,2 or 0-4"):
        load_settings(sets=["run.seeds=4-1"], environ={})


@pytest.mark.parametrize("key", ["run.results", "run.data", "datasets.faces.raw", "backbones.mini.weights"])
def test_a_path_may_begin_at_home(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(value(key, f"{key}=~/faces")) == str(tmp_path / "faces")
    assert str(value(key, f"{key}=faces~/x")) == "faces~/x"


def test_paths_of_datasets_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value("run.datasets", "run.datasets=synthetic,~/faces") == ("synthetic", str(tmp_path / "faces"))


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "bench.toml"
    file.write_bytes(b"\xef\xbb\xbf[train]\nepochs = 3\n")
    assert value("train.epochs", file=file) == 3


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path):
    file = tmp_path / "bench.toml"
    file.write_bytes(b"[train]\n# f\xfcr\nepochs = 3\n")
    with pytest.raises(ConfigError, match=r"bench\.toml: line 2 is not UTF-8; TOML files are UTF-8, so save the file in that encoding"):
        load_settings(file=file, environ={})
