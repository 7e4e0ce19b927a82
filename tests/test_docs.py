"""What the documentation tells people to type works as it stands.

A fence of commands runs as it is written, in a folder with a tiny bench.toml, unless its first line says why not:
```` ```bash no-run: needs a GPU ````. The commands of every fence are read by the real command line, whether they run or not.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import typer.main
import yaml

import bench
from bench.cli.main import app
from bench.config import Config, load_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
SHELL = ("bash", "sh")
OF_THE_SYSTEM = ("cp", "git", "pre-commit", "tar")
"""Programs whose arguments are not looked at."""


class Fence(NamedTuple):
    page: str
    line: int
    language: str
    remark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"^(?P<fence>```+)(?P<language>[\w{}-]*)(?P<remark>[^\n]*)\n(?P<text>.*?)^(?P=fence)$", re.DOTALL | re.MULTILINE)
    return [
        Fence(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["remark"].strip(),
            match["text"],
        )
        for match in pattern.finditer(text)
    ]


ALL = [fence for page in PAGES for fence in fences(page)]


def commands(fence: Fence) -> list[list[str]]:
    lines = fence.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_language(*languages: str) -> list:
    return [pytest.param(fence, id=fence.place) for fence in ALL if fence.language in languages]


def to_run(page: Path) -> list[Fence]:
    return [fence for fence in fences(page) if fence.language in SHELL and not fence.remark]


def test_what_does_not_run_says_why():
    for fence in ALL:
        if fence.language in (*SHELL, "python") and fence.remark:
            assert re.fullmatch(r"no-run: \S.*", fence.remark), fence.place


def test_quotations_stand_in_the_files_they_are_from():
    for fence in ALL:
        if fence.remark.startswith("no-run: quoted from "):
            file = fence.remark.removeprefix("no-run: quoted from ")
            assert fence.text in (ROOT / file).read_text(encoding="utf-8"), f"{fence.place}: not in {file}"


def arguments_of_bench(words: list[str]) -> list[str] | None:
    """The arguments of bench, also where another program starts it; None if the command is another one."""
    if words[0] in ("torchrun", "accelerate"):
        return words[words.index("-m") + 2 :] if "-m" in words else words[words.index("bench") + 1 :]
    if words[0] == "srun":
        return words[words.index("bench") + 1 :]
    return words[1:] if words[0] == "bench" else None


def parse(arguments: list[str], *, place: str) -> None:
    """Read arguments, a verb first, as `bench` does, without doing anything."""
    command = typer.main.get_command(app)
    context = None
    name = "bench"
    rest = [word for word in arguments if word != "..."]
    try:
        while hasattr(command, "resolve_command"):
            context = command.context_class(command, info_name=name, parent=context)
            name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)
    except Exception as error:
        raise AssertionError(f"{place}: bench {shlex.join(arguments)}: {error}") from error


def check_of_this_project(words: list[str], *, place: str) -> None:
    """Targets of make, extras of pip and scripts are those of this checkout."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for word in rest:
            assert "=" in word or word in " ".join(targets).split(), f"{place}: make {word}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert name in extras, f"{place}: extra {name}"
    elif program in ("pytest", ".venv/bin/pytest", ".venv/bin/ruff", ".venv/bin/pre-commit"):
        for word in rest:
            if "/" in word:
                assert (ROOT / word).exists(), f"{place}: {word}"
    else:
        assert program in OF_THE_SYSTEM, f"{place}: {program}: not known to this test"


@pytest.mark.parametrize("fence", of_language(*SHELL))
def test_the_command_line_takes_every_command(fence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(fence):
        arguments = arguments_of_bench(words)
        if arguments is None:
            check_of_this_project(words, place=fence.place)
        else:
            parse(arguments, place=fence.place)


@pytest.mark.parametrize("command", ["run --no-such-option", "no-such-verb", "run --nproc two", "data no-such-verb x"])
def test_a_command_that_bench_does_not_take_is_noticed(command):
    with pytest.raises(AssertionError, match="here"):
        parse(command.split(), place="here")


@pytest.mark.parametrize("fence", of_language("toml"))
def test_settings_on_the_pages_are_settings(fence, tmp_path):
    tree = tomllib.loads(fence.text)
    if tree.keys() <= Config.model_fields.keys():
        file = tmp_path / "bench.toml"
        file.write_text(fence.text)
        load_settings(environ={}, file=file)
    else:
        assert tree.keys() == {"project"}, fence.place  # the pyproject.toml of a plugin


@pytest.mark.parametrize("fence", of_language("yaml"))
def test_yaml_on_the_pages_is_yaml(fence):
    assert yaml.safe_load(fence.text)


def test_only_these_languages_are_on_the_pages():
    directives = {"{include}", "{toctree}", "{eval-rst}"}
    assert {fence.language for fence in ALL} <= {*SHELL, "python", "toml", "yaml", "text", *directives}


TINY = {
    "BENCH_RUN__RESULTS": "runs",
    "BENCH_RUN__BACKBONES": "mini",
    "BENCH_IMAGES__SIZE": "32",
    "BENCH_TRAIN__EPOCHS": "2",
    "BENCH_DATASETS__SYNTHETIC__SIZE": "36",
    "BENCH_DATASETS__SYNTHETIC__TRAIN": "48",
    "BENCH_DATASETS__SYNTHETIC__VAL": "14",
    "BENCH_DATASETS__SYNTHETIC__TEST": "28",
}
"""Settings that win over those of the page's profile."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if to_run(page)])
def test_the_commands_of_a_page_run_in_its_order(page, project, run_bench, data_root):
    (project / "data").symlink_to(data_root)
    for fence in fences(page):
        if fence.language == "python" and not fence.remark:
            name = re.search(r"Save it as `(\w+\.py)`", page.read_text(encoding="utf-8"))
            assert name is not None, fence.place
            (project / name[1]).write_text(fence.text)
        for words in commands(fence) if fence.language in SHELL and not fence.remark else ():
            assert words[0] == "bench", f"{fence.place}: only bench is run; mark the fence with no-run: and a reason"
            done = run_bench(*words[1:], cwd=project, env=TINY)
            assert done.returncode == 0, f"{fence.place}: {shlex.join(words)}\n{done.stdout}{done.stderr}"
            if page.name == "add-a-method.md":
                assert "12 cells done" in done.stdout
                assert "SharpCAM" in done.stdout


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            linked = page.parent / file if file else page
            assert linked.exists(), target
            assert not anchor or anchor in headings(linked), target


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    # Names in capitals stand for something: methods/NAME.py.
    for name in re.findall(r"`((?:\.github|bench|methods|backbones|datasets|tests|docs|results|benchmarks)/[\w./-]*)`", text):
        assert re.search(r"[A-Z]{4,}(?!\.md)", name) or (ROOT / name).exists(), name


def test_the_readme_shows_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_architecture_names_every_room():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for room in (ROOT / "bench").iterdir():
        if (room / "__init__.py").exists():
            assert f"`{room.name}/`" in page, room.name


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == bench.__version__
    assert str(citation["date-released"]) == newest[2]


def test_public_ci_calls_the_make_targets_of_the_private_one():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    parts = re.search(r"for part in (.+); do", (ROOT / ".ci/run").read_text())
    assert parts is not None
    called = set(re.findall(r"make ([\w-]+)", "\n".join(steps)))
    assert set(parts[1].split()) <= called
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8")), form.name


class Links(HTMLParser):
    """Ids, links, and what a browser loads by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value for name, value in attrs if value}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        else:
            self.loads += [values[name] for name in ("src", "href", "srcset", "data") if name in values]


@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")), reason="make docs installs the generator")
def test_the_site_is_whole_and_loads_nothing_from_the_network(tmp_path):
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--doctree-dir", str(tmp_path / "work")]
    command = [sys.executable, "-P", "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))
    for page, links in pages.items():
        assert not [load for load in links.loads if urlsplit(load).netloc], page.name
        for link in (*links.links, *links.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].ids, f"{page.name}: {link}"
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name
    for name in ("Method", "Backbone", "Dataset", "Registry", "Settings", "Record"):
        assert any(identifier.endswith(f".{name}") for identifier in pages[tmp_path / "site" / "reference.html"].ids), name
