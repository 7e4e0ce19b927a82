"""Settings of the documentation site: ``make docs`` writes it to build/docs. Nothing on the pages is loaded from the network."""

from sphinx.application import Sphinx

from bench import __version__

project = "bench"
author = "the authors of bench"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []

# Headings get the anchors that GitHub gives them, so that one link serves both.
myst_heading_anchors = 3

# `name` in a docstring is a link where the reference has the name, and code where it has not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init, __init__"}
napoleon_google_docstring = True
# A class that several pages mention by its short name (`Options`) is no error.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"bench {release}"
html_copy_source = False
html_show_sphinx = False

_written: dict[str, list[str]] = {}


def _keep(_app: Sphinx, what: str, name: str, _object: object, _options: object, lines: list[str]) -> None:
    if what == "attribute":
        _written[name] = lines[:]


def _restore(_app: Sphinx, _what: str, name: str, _object: object, _options: object, lines: list[str]) -> None:
    if name in _written:
        lines[:] = _written.pop(name)


def setup(app: Sphinx) -> None:
    """Show the docstring of an attribute as it is written: Napoleon takes what stands before a colon for the attribute's type."""
    app.connect("autodoc-process-docstring", _keep, priority=100)
    app.connect("autodoc-process-docstring", _restore, priority=900)
