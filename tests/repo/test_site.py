"""The site of `make site`: whole, every link alive, nothing loaded from elsewhere."""

import contextlib
import io
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
DRAW = "outputs/checkpoints/best/draw.html"
pytestmark = pytest.mark.filterwarnings("ignore:'myst_parser")


def build(source, out):
    """Build the site of a folder as make does; return the exit status and what was said.

    In this process, as importing Sphinx with its extensions takes longer than a small build.
    """
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"-m sphinx (.+) -d \S+ \. build/site$", makefile, re.MULTILINE)[1].split()
    said = io.StringIO()
    with contextlib.chdir(source), redirect_stdout(said), redirect_stderr(said):
        status = build_main([*options, "-d", f"{out / 'doctrees'}", ".", f"{out / 'site'}"])
    return status, said.getvalue()


class Page(HTMLParser):
    """What an HTML file names: anchors, links, and what a browser loads without being asked."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag != "a":
            named = (given.get(key) for key in ("href", "src", "data", "poster", "srcset"))
            self.loads += [name for name in named if name]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the site of this repository, and its pages by path."""
    out = tmp_path_factory.mktemp("built")
    status, said = build(ROOT, out)
    assert (status, said) == (0, "")
    pages = {p.resolve(): Page(p.read_text(encoding="utf-8")) for p in out.glob("site/**/*.html")}
    return (out / "site").resolve(), pages


def dead_links(pages):
    """Return each local link of the pages that leads to no file or no anchor."""
    dead = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and anchor not in pages[target].ids):
                dead.append((path.name, link))
    return dead


def outside(folder, pages):
    """Return what a browser would load from elsewhere to show these pages."""
    found = [load for page in pages.values() for load in page.loads]
    for path in [*folder.rglob("*.css"), *folder.rglob("*.html")]:
        found += re.findall(r"url\(\s*[\"']?([^\"')]+)", path.read_text(encoding="utf-8"))
        found += re.findall(r"@import\s+[\"']([^\"']+)", path.read_text(encoding="utf-8"))
    return [load for load in found if re.match(r"(?!data:)\w+:|//", load)]


def test_the_sidebar_lists_the_readme_the_notebooks_as_questions_and_the_other_texts(site):
    folder, _ = site
    text = (folder / "index.html").read_text(encoding="utf-8")
    listed = re.findall(r'<li class="toctree-l1.*?href="(.+?)">(.+?)</a>', text)
    pages, titles = zip(*listed, strict=True)
    notebooks = slice(1, 1 + len(NOTEBOOKS))
    assert pages[0] == "#"
    assert list(pages[notebooks]) == [f"notebooks/{name}.html" for name in NOTEBOOKS]
    assert all(title.endswith("?") for title in titles[notebooks])
    assert {"outputs/LOG.html", "REFERENCES.html", "CONTRIBUTING.html"} <= set(pages)
    assert {f"docs/{path.stem}.html" for path in ROOT.glob("docs/*.md")} - set(pages) == set()


def test_every_link_on_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    assert sum(len(page.links) for page in pages.values()) > 500
    assert dead_links(pages) == []
    assert outside(folder, pages) == []
    links = {link for page in pages.values() for link in page.links if urlsplit(link).scheme}
    assert len(links) > 30
    address = r"https://[\w-]+(\.[\w-]+)+(/[^\s\"<>]*)?"
    assert [link for link in links if not re.fullmatch(address, link)] == []


def test_formulas_are_drawn_without_a_script_and_the_site_stays_small(site):
    folder, _ = site
    text = (folder / "notebooks" / "07_how_sure_are_we.html").read_text(encoding="utf-8")
    assert text.count("<math ") > 5
    assert "<msqrt>" in text
    assert not re.search(r"<script[^>]*(mathjax|katex)", text, re.IGNORECASE)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000


README = """# A project

[A text](REFERENCES.md#the-last), [a table](data.csv), [elsewhere](https://example.org/a).
![A picture](dot.png)

$\\hat p_1 = \\big(x\\big)$

"""
BAD = {
    "nothing.md": "[a file that is missing](nothing.md)",
    "no-such-anchor": "[an anchor that is missing](REFERENCES.md#no-such-anchor)",
    "htps://example.org": "[a scheme with a typing error](htps://example.org)",
    "nothing.png": "![a picture that is missing](nothing.png)",
    "\\nonsense": "$\\nonsense{x}$",
}


def test_each_fault_of_a_text_is_named_and_fails_the_build_and_what_is_right_is_built(tmp_path):
    source, out = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "docs", source / "docs", ignore=shutil.ignore_patterns("*.md"))
    (source / "README.md").write_text(README + "\n\n".join(BAD.values()), encoding="utf-8")
    (source / "REFERENCES.md").write_text("# References\n\n## The last\n", encoding="utf-8")
    (source / "data.csv").write_text("a,b\n", encoding="utf-8")
    shutil.copy(next((ROOT / "outputs" / "figures").glob("*.png")), source / "dot.png")
    status, said = build(source, tmp_path)
    assert status == 1
    warnings = [line for line in said.splitlines() if "README.md" in line and "WARNING" in line]
    assert len(warnings) == len(BAD)
    assert [name for name in BAD if not any(name in line for line in warnings)] == []
    text = (out / "README.html").read_text(encoding="utf-8")
    links = {"REFERENCES.html#the-last", "data.csv", "https://example.org/a"}
    assert links <= set(Page(text).links)
    assert (out / "data.csv").read_text(encoding="utf-8") == "a,b\n"
    assert "<mover" in text


def test_the_checks_find_dead_links_and_loads_from_elsewhere(tmp_path):
    path = tmp_path / "page.html"
    for html, dead, loads in [
        ('<a href="gone.html">x</a>', 1, 0),
        ('<a href="#gone">x</a><a id="here" href="#here">x</a>', 1, 0),
        ('<img src="gone.png">', 1, 0),
        ('<script src="https://example.org/a.js"></script>', 0, 1),
        ('<link rel="stylesheet" href="//example.org/a.css">', 0, 1),
        ('<style>@import "https://a.org/b.css"; p { background: url(//a.org) }</style>', 0, 2),
        ('<a href="https://example.org">x</a><img src="data:image/png;base64,AA==">', 0, 0),
    ]:
        path.write_text(html, encoding="utf-8")
        pages = {path: Page(html)}
        assert (len(dead_links(pages)), len(outside(tmp_path, pages))) == (dead, loads)
