"""The page of `flashclient serve --ui` in a real browser: a chat, Stop, keys, figures, sizes and colours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, opened_page
from checkpoints import make_checkpoint
from daemon import serving
from openai_servers import server_of

from weightd import cli

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
NAME = "tiny-page"
KEY = "sk-page"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
DONE = "!document.getElementById('send').hidden && document.querySelectorAll('article').length >= {}"
MARKDOWN = """# Title
Some *soft* and **hard** `code` and [a link](https://example.com/a?b=c) <img src=x onerror=alert(1)>

- one
- two

1. first
> quoted

```c
int a = 1 < 2;
```
[bad](javascript:alert(1))"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    checkpoint = make_checkpoint("llama", folder / NAME, max_position_embeddings=2048)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": None}))
    assert cli.main(["import", str(checkpoint), "--store", str(folder / "store")]) == 0
    keys = folder / "keys"
    keys.write_text(KEY)
    with (
        serving(folder / "store", "--dram", "64MiB") as daemon,
        server_of(daemon, NAME, flags=("--ui", "--api-key-file", str(keys))) as url,
    ):
        yield url.removesuffix("/v1")


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    with opened_page() as opened:
        opened.size(1280, 800)
        opened.send("Page.navigate", url=f"{address}/")
        opened.until("document.readyState === 'complete' && !document.getElementById('keys').hidden")
        assert "this server wants an API key" in opened.run("document.getElementById('notice').textContent")
        opened.errors.clear()  # the browser logs status 401
        opened.run(f"document.getElementById('key').value = '{KEY}'; document.getElementById('keys').requestSubmit()")
        opened.until("document.getElementById('models').options.length === 1")
        yield opened


def say(page: Page, text: str) -> None:
    script = f"document.getElementById('text').value = {json.dumps(text)};"
    page.run(script + "document.getElementById('asking').requestSubmit()")


def picture(page: Page, name: str, tmp_path: Path) -> None:
    """Keeps a picture where PAGE_PICTURES says so, for people to look at."""
    page.picture(Path(os.environ.get("PAGE_PICTURES", tmp_path)) / f"{name}.png")


def test_a_chat(page: Page, address: str, tmp_path: Path) -> None:
    page.run("document.getElementById('new').click()")
    say(page, "Hi")
    page.until("document.querySelector('article.assistant')?.textContent.length > 20")
    page.until("document.getElementById('layers').children.length === 2")
    page.until("/^[1-9][0-9.]* tokens.s$/.test(document.getElementById('speed').textContent)")
    page.run("document.getElementById('stop').click()")
    page.until(DONE.format(2))
    assert "stopped" in page.run("document.querySelector('article.assistant footer').textContent")
    page.until("document.getElementById('load').textContent === '0, 0'")
    assert page.run("document.getElementById('mode').textContent") == "exact"
    assert " of 64.0 MiB: pool " in page.run("document.getElementById('memory-text').textContent")
    assert page.errors == []


def test_a_new_chat_during_an_answer_is_empty(page: Page) -> None:
    page.run("document.getElementById('new').click()")
    say(page, "Hi")
    page.until("document.querySelector('article.assistant')?.textContent.length > 20")
    page.run("document.getElementById('new').click()")
    page.until("chat.asking === null && !document.getElementById('send').hidden")
    assert page.run("chat.messages.length + document.querySelectorAll('article').length") == 0
    assert page.errors == []


def test_markdown(page: Page, tmp_path: Path) -> None:
    page.run("document.getElementById('new').click(); show('user').textContent = 'Tell me <b>';")
    page.run(f"render(show('assistant'), {json.dumps(MARKDOWN)})")
    shown: Any = page.run("document.querySelector('article.assistant').innerHTML")
    assert "<h3>Title</h3>" in shown
    assert "<em>soft</em> and <strong>hard</strong> <code>code</code>" in shown
    assert '<a href="https://example.com/a?b=c" rel="noopener noreferrer" target="_blank">a link</a>' in shown
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown
    assert "<ul><li>one</li><li>two</li></ul>" in shown
    assert "<pre><code>int a = 1 &lt; 2;</code></pre>" in shown
    assert "javascript:" not in page.run("[...document.querySelectorAll('a')].map(one => one.href).join()")
    for name, width, height, dark in (
        ("wide-light", 1280, 800, False),
        ("wide-dark", 1280, 800, True),
        ("narrow-light", 390, 844, False),
        ("narrow-dark", 390, 844, True),
    ):
        page.size(width, height, dark)
        assert page.run("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"
        picture(page, name, tmp_path)
    page.size(1280, 800)
    assert page.errors == []


def test_errors_are_shown(page: Page) -> None:
    page.run("document.getElementById('new').click()")
    say(page, "long " * 3000)
    page.until("!document.getElementById('notice').hidden")
    assert "the model's context is 2048 tokens" in page.run("document.getElementById('notice').textContent")
    assert page.run("document.querySelectorAll('article').length") == 0
    assert page.run("document.getElementById('text').value.length") > 1000
    page.errors.clear()  # the browser logs status 400
