"""What scripts/frameworks runs beside LangChain and LlamaIndex: each must say what the server says to plain HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.request
from typing import Any, Literal

from langchain_openai import ChatOpenAI, OpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

MODEL, ADDRESS = sys.argv[1:]
QUESTION = "def add(a, b):"
TOKENS = 24
GREEDY = {"temperature": 0.0, "max_tokens": TOKENS}


class Town(BaseModel):
    """A town."""

    name: Literal["Paris", "Lyon"]
    by_the_sea: bool


def main() -> None:
    chat = _asked("/chat/completions", messages=[{"role": "user", "content": QUESTION}])["message"]["content"]
    text = _asked("/completions", prompt=QUESTION)["text"]
    print(f"plain HTTP: {chat!r}")
    langchain(chat, text)
    llama_index(chat, text)


def langchain(chat: str, text: str) -> None:
    model = ChatOpenAI(model=MODEL, base_url=ADDRESS, api_key="none", **GREEDY)
    answer = model.invoke(QUESTION)
    assert answer.content == chat, answer
    assert answer.usage_metadata["output_tokens"] <= TOKENS, answer
    streamed = list(model.stream(QUESTION))
    assert len(streamed) > 2, streamed
    assert "".join(chunk.content for chunk in streamed) == chat, streamed
    assert [one.content for one in model.batch([QUESTION] * 3)] == [chat] * 3
    assert asyncio.run(model.ainvoke(QUESTION)).content == chat
    completing = OpenAI(model=MODEL, base_url=ADDRESS, api_key="none", **GREEDY)
    assert completing.invoke(QUESTION) == text
    assert "".join(completing.stream(QUESTION)) == text
    heated = {"temperature": 2.0, "seed": 1, "max_tokens": 200}  # greedily this model would write spaces for ever
    roomy = ChatOpenAI(model=MODEL, base_url=ADDRESS, api_key="none", **heated)
    form = roomy.with_structured_output(Town, method="json_schema").invoke(QUESTION)
    assert isinstance(form, Town), form
    print(f"LangChain: the same answers, streams, batches; {form!r}")


def llama_index(chat: str, text: str) -> None:
    model = OpenAILike(model=MODEL, api_base=ADDRESS, api_key="none", is_chat_model=True, **GREEDY)
    said = [ChatMessage(role="user", content=QUESTION)]
    assert model.chat(said).message.content == chat
    streamed = list(model.stream_chat(said))
    assert len(streamed) > 2, streamed
    assert streamed[-1].message.content == chat, streamed[-1]
    assert asyncio.run(model.achat(said)).message.content == chat
    completing = OpenAILike(model=MODEL, api_base=ADDRESS, api_key="none", is_chat_model=False, **GREEDY)
    assert completing.complete(QUESTION).text == text
    assert "".join(piece.delta for piece in completing.stream_complete(QUESTION)) == text
    print("LlamaIndex: the same answers and streams")


def _asked(path: str, **body: Any) -> Any:
    request = urllib.request.Request(ADDRESS + path, json.dumps({"model": MODEL, **GREEDY, **body}).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request, timeout=600))["choices"][0]


main()
