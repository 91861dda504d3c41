"""Sphinx' settings of the site. Pages of notebooks and modules are written first, into docs/pages: `make docs`."""
import re
from pathlib import Path

from mlops_nb.documentation.links import with_sections
from mlops_nb.documentation.pages import write_pages

ROOT, DOCS = Path(__file__).parents[1], Path(__file__).parent

project, author = "mlops_nb", "The mlops_nb authors"
copyright = f"2026 onwards, {author}"
extensions = ["myst_nb"]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.empty_glob"]

html_theme = "furo"
html_title = "mlops_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"  # the pages hold what the runs have executed
nb_output_stderr = "remove"  # warnings of libraries are no results
nb_code_prompt_show, nb_code_prompt_hide = "code", "code"
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_heading_anchors = 4  # links to headings are checked

add_module_names = False
toc_object_entries = False
python_maximum_signature_line_length = 88
linkcheck_timeout = 20


def setup(app):
    site = write_pages(ROOT, DOCS, package=ROOT / "mlops_nb")
    app.config.linkcheck_ignore = [f"{re.escape(site.host)}/(blob|tree)/.*"]  # that these files exist is known

    def use_site_links(app, name, source):
        page = DOCS / f"{name}.md"
        if page.exists() and not name.startswith("pages/"): source[0] = with_sections(site, page, source[0])

    app.connect("source-read", use_site_links)
