"""The demo models' text: what is kept of a page, which pages are read, held out and dropped."""

from __future__ import annotations

from pathlib import Path

from demonstration.text import PAGE_BYTES_MIN, plain_html, plain_pod, read_pages

LONG = "A paragraph that is long enough to be told from a heading or from a cell. "


def write(root: Path, name: str, body: str) -> None:
    path = root / "usr/share/doc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<html><head><title>x</title></head><body>{body}</body></html>")


def paragraphs(count: int, word: str) -> str:
    return "".join(f"<p>{LONG}{word} {number}</p>" for number in range(count))


def test_blocks_become_paragraphs_and_lines_of_code_stay() -> None:
    page = (
        '<nav>menu</nav><h1>Title<a class="headerlink" href="#">¶</a></h1>'
        "<p>One &lt;two&gt;\n <b>three</b></p><pre>a\n  b</pre>"
    )
    assert plain_html(page) == "Title\n\nOne <two> three\n\na\n  b"


def test_only_the_main_part_of_a_page_is_kept() -> None:
    page = '<p>before</p><div class="body" role="main"><p>kept</p><div class="clearer"></div></div><p>after</p>'
    assert plain_html(page) == "kept"


def test_pod_loses_its_commands_and_marks() -> None:
    assert plain_pod("=head1 NAME\n\nC<f> and B<< a > b >> of L<I<x>>\n\n=cut\n") == "NAME\n\nf and a > b of x"


def test_repeats_other_languages_and_short_pages_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, "p/a.html", paragraphs(9, "a"))
    write(tmp_path, "p/b.html", paragraphs(9, "a"))
    write(tmp_path, "p/c.html", "<p>short</p>")
    write(tmp_path, "p/d.html", "<p>" + "слово " * PAGE_BYTES_MIN + "</p>")
    write(tmp_path, "p/_sources/e.html", paragraphs(9, "e"))
    assert [page.name for page in read_pages([tmp_path])] == ["doc/p/a.html"]


def test_where_the_packages_lie_changes_nothing_but_the_root(tmp_path: Path) -> None:
    for root in ("one", "other"):
        for number in range(120):
            write(tmp_path / root, f"p/{number}.html", paragraphs(9, f"{number}"))
    first, second = (read_pages([tmp_path / root]) for root in ("one", "other"))
    assert [(page.name, page.text, page.held_out) for page in first] == [
        (page.name, page.text, page.held_out) for page in second
    ]
    assert {page.root.name for page in first} == {"one"}
    assert 0 < sum(page.held_out for page in first) < len(first) / 10


def test_an_empty_folder_has_no_pages(tmp_path: Path) -> None:
    assert read_pages([tmp_path]) == []
