from __future__ import annotations

import textwrap

import pytest

from bench.method import METHODS, Method
from bench.registry import EntryInfo, EntryOptions, Registry, UnknownEntryError, foreign_code, is_foreign, load_plugin


class Thing:
    Options = EntryOptions


def _registry() -> Registry[Thing, EntryInfo]:
    return Registry("thing", group="bench.no_such_group", base=lambda: Thing, info=EntryInfo)


def _add(registry, name, **info):
    @registry.register(name, title=name.title(), **info)
    class Entry(Thing):
        pass

    return Entry


def test_an_entry_is_found_with_its_data_and_origin():
    registry = _registry()
    cls = _add(registry, "lamp", paper="Doe, 2020", year=2020)
    entry = registry.get("lamp")
    assert entry.target is cls
    assert (entry.info.paper, entry.info.year) == ("Doe, 2020", 2020)
    assert __file__ in entry.origin


def test_a_mistyped_name_gets_a_proposal_and_the_list():
    registry = _registry()
    _add(registry, "layercam")
    with pytest.raises(UnknownEntryError, match=r"unknown thing 'layrcam'\. Did you mean 'layercam'\? Available: layercam"):
        registry.get("layrcam")


def test_a_duplicate_is_refused_with_both_origins():
    registry = _registry()
    first = _add(registry, "lamp")

    class Other(Thing):
        pass

    with pytest.raises(ValueError, match=r"defined twice: in .*test_registry.py:\d+ and in .*test_registry.py:\d+"):
        registry.register("lamp", title="Other")(Other)
    assert registry.get("lamp").target is first


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="does not derive from Thing"):
        _registry().register("x", title="X")(dict)


def test_an_unknown_field_of_the_data_is_refused():
    with pytest.raises(TypeError, match="papper"):
        _add(_registry(), "x", papper="typo")


@pytest.mark.parametrize("name", ["CAM", "a b", "a,b", "a/b"])
def test_a_name_that_could_not_be_typed_is_refused(name):
    with pytest.raises(ValueError, match="lower case"):
        _add(_registry(), name)


def test_names_are_known_without_importing_the_entries(run_python):
    code = """
import sys
from bench.method import METHODS
assert "cam" in METHODS.names()
assert "bench.methods.cam" not in sys.modules
METHODS.get("cam")
assert "bench.methods.cam" in sys.modules
"""
    run_python(code)


def test_every_built_in_entry_loads_and_is_registered_by_the_module_its_entry_point_names():
    from bench.backbone import BACKBONES
    from bench.dataset import DATASETS

    for registry in (METHODS, BACKBONES, DATASETS):
        for entry in registry:
            assert entry.info.title
            assert entry.target.Options.model_validate({}) is not None


def test_a_post_hoc_method_must_say_what_it_trains_as():
    with pytest.raises(ValueError, match="train as another"):
        METHODS.register("x-test", title="X", kind="posthoc")(type("X", (Method,), {}))


def test_a_plugin_file_registers_once_however_often_it_is_loaded(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        textwrap.dedent("""
        from bench.method import METHODS
        from bench.methods.cam import CAM

        @METHODS.register("own-cam-test", title="Own", kind="posthoc", trains_as="cam")
        class Own(CAM):
            pass
        """)
    )
    load_plugin(str(path))
    load_plugin(str(path))
    assert METHODS.get("own-cam-test").origin.startswith(str(path))


@pytest.mark.parametrize(("target", "message"), [("no_such.py", "no such file"), ("no.such.module", "No module named")])
def test_a_plugin_that_is_not_there_is_an_error_that_names_it(target, message):
    with pytest.raises(ValueError, match=message):
        load_plugin(target)


def test_a_plugin_that_fails_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"broken\.py: ZeroDivisionError"):
        load_plugin(str(path))


def test_entries_of_the_program_and_members_of_its_families_are_not_foreign():
    from bench.backbone import BACKBONES
    from bench.method import METHODS

    for entry in (*METHODS, *BACKBONES, BACKBONES.get("timm:test_resnet"), BACKBONES.get("timm:test_vit")):
        if entry.target.__module__.partition(".")[0] in ("bench", "abc"):
            assert not is_foreign(entry.target)
            assert foreign_code(entry.target) is None
    assert is_foreign(pytest.Item)
