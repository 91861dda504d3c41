"""Sphinx' settings of the site. The pages of notebooks and modules are written first, into docs/pages: `make docs`."""
from pathlib import Path

from mlops_nb.documentation.sphinx_site import site_settings

globals().update(site_settings(Path(__file__).parents[1], package="mlops_nb"))
