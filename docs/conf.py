"""Sphinx configuration: `make docs` builds the site and runs the examples of the docstrings."""

import doctest
import sys
from pathlib import Path

import mmfused

sys.path.insert(0, str(Path(__file__).parent))  # for docstrings.py

project = "mmfused"
author = "the mmfused authors"
copyright = "the mmfused authors, MIT licence"
version = release = mmfused.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax with the site, so that formulas need no other server
    "sphinx_copybutton",
    "docstrings",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"mmfused {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": "https://github.com/mmfused/mmfused/",
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"code-font-size": "var(--font-size--small--2)"},
    "dark_css_variables": {"code-font-size": "var(--font-size--small--2)"},
}

# Markdown: formulas between dollar signs, definitions, and links to headings.
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

# Docstrings: Google style, types from the annotations, members in the order of the source.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
default_role = "code"
maximum_signature_line_length = 78  # a longer signature has one parameter a line

# Each reference to a function, method or module must have a target. Classes of torch and Python,
# which type annotations name, have their pages elsewhere, and fields have no pages.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(?!mmfused\.(\w+$|(losses|models|data|testing)\.\w+$)).*"),
    ("py:(attr|exc)", r"(?!mmfused\.\w).*"),
]

# The examples of pages and docstrings run with these names, each page from the same seed.
doctest_global_setup = """
import torch
import mmfused
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)
"""
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
trim_doctest_flags = True
