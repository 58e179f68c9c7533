"""The site that `make site` builds: README, notebooks as executed and other texts, no network.

Sphinx reads the repository itself, so each relative link works here as on GitHub.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.util import logging

DRAW = "outputs/checkpoints/best/draw.html"
ORDER = ("docs/draw", "docs/use", "docs/results", "docs/enter", "docs/timing", "docs/reference")
ORDER += ("docs/setup", "outputs/checkpoints/best/MODEL_CARD", "docs/surprises", "outputs/LOG")
ORDER += ("outputs/README", "REFERENCES", "CONTRIBUTING")

project = html_title = "mnistlib"
language = "en"
extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["README.md", "notebooks/*.ipynb", *(f"{name}.md" for name in ORDER)]
exclude_patterns = [".*", "build", "outputs/runs"]
exclude_patterns += [] if Path("..", DRAW).exists() else ["docs/draw.md"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_url_schemes = ["https"]  # anything else must be a file of the repository

highlight_language = "none"  # of what is fenced without a language, as on GitHub

html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_use_index = html_show_sphinx = html_show_copyright = False


def prepare_source(app, docname, source):
    """Give README the contents, links into notebooks the site's anchors; leave out checks."""
    if docname == root_doc:
        found = app.project.docnames
        listed = sorted(name for name in found if name.startswith("notebooks/"))
        listed += [name for name in ORDER if name in found]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "Overview <self>", *listed, "```"])
    # cells that only check; `check` closes them in JupyterLab
    source[0] = re.sub(r'(?<=")check(?="\s*[],])', "remove-cell", source[0])
    # Jupyter's anchor is the heading with dashes, GitHub's has neither capitals nor punctuation
    source[0] = re.sub(
        r"(\.ipynb#)([^)\s]+)", lambda m: m[1] + re.sub(r"[^\w-]", "", m[2].lower()), source[0]
    )


def ship_linked_files(app, doctree):
    """Copy each file that a text links to, to the same place on the site."""
    for link in list(doctree.findall(addnodes.download_reference)):
        name, path = app.env.relfn2path(link["reftarget"], app.env.docname)
        target = Path(app.outdir, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        link.replace_self(nodes.reference("", "", *link.children, refuri=link["reftarget"]))


def write_math(writer, node):
    """Write a formula as MathML, which browsers draw without a script."""
    tex = re.sub(r"\\([bB]igg?)(?![a-zA-Z])", r"\\\1l", node.astext())  # docutils lacks \big
    # and it sets what follows an accent under the letter: \hat p_i
    tex = re.sub(r"(\\(?:bar|hat|tilde) ?(?:\w|\\[a-zA-Z]+|\{[^{}]*\}))(?=[_^])", r"\1{}", tex)
    try:
        writer.body.append(tex2mathml(tex, as_block=isinstance(node, nodes.math_block)))
    except MathError as error:
        logging.getLogger(__name__).warning("no MathML for %s: %s", tex, error, location=node)
    raise nodes.SkipNode


def copy_start_page(app, exception):
    """Let the bare address of the site show the README."""
    if not exception:
        shutil.copyfile(Path(app.outdir, "README.html"), Path(app.outdir, "index.html"))


def setup(app):
    """Connect the four functions above."""
    app.connect("source-read", prepare_source)
    app.connect("doctree-read", ship_linked_files, priority=400)  # before Sphinx collects them
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("build-finished", copy_start_page)
