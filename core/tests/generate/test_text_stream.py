"""Text comes in whole characters, and several texts come in the order of their requests."""

from __future__ import annotations

from attn_core.generate.text_stream import OrderedOutput, TextStream
from hypothesis import given
from hypothesis import strategies as st


def by_bytes(tokens: list[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=20))
def test_the_pieces_joined_are_the_text(text: str) -> None:
    stream = TextStream(by_bytes)
    pieces = [stream.add(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.rest() == text


def test_a_character_comes_when_it_is_complete() -> None:
    stream = TextStream(by_bytes)
    assert [stream.add(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_what_is_left_of_a_character_is_shown_at_the_end() -> None:
    stream = TextStream(by_bytes)
    assert stream.add("é".encode()[0]) == ""
    assert stream.rest() == "\ufffd"


def test_a_tokenizer_that_drops_a_leading_space_does_not_drop_it_in_the_middle() -> None:
    words = {1: " Hello", 2: " world", 3: "!"}
    stream = TextStream(lambda tokens: "".join(words[t] for t in tokens).removeprefix(" "))
    assert [stream.add(t) for t in (1, 2, 3)] == ["Hello", " world", "!"]


def test_the_first_unfinished_text_is_live_and_the_others_wait() -> None:
    written: list[str] = []
    out = OrderedOutput([TextStream(by_bytes) for _ in range(3)], written.append, lambda i: f"[{i}] ")
    out.add(1, ord("b"))
    out.add(0, ord("a"))
    assert "".join(written) == "[0] a"
    out.finish(1)
    out.add(2, ord("c"))
    assert "".join(written) == "[0] a"
    out.finish(0)
    assert "".join(written) == "[0] a\n[1] b\n[2] c"
    out.add(2, ord("d"))
    out.finish(2)
    assert "".join(written) == "[0] a\n[1] b\n[2] cd\n"
