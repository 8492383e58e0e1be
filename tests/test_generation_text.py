"""The text of an answer: UTF-8 across tokens, stop strings across tokens, nothing released too early."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text_stream import TextStream


def stream(parts: list[bytes], stop: list[str], strip_space: bool = False) -> tuple[list[str], bool]:
    text = TextStream(lambda index: parts[index], stop, strip_space)
    released = []
    for index in range(len(parts)):
        released.append(text.push(index))
        if text.stopped:
            return released, True
    released[-1:] = [released[-1] + text.finish()] if released else []
    return released, False


def first_completed(text: str, stops: list[str]) -> str:
    """Slow oracle: read one character at a time until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(borders)]


TEXT = st.text(alphabet="abcäß€😀 \n", max_size=40)
STOPS = st.lists(st.text(alphabet="abcä€😀\n", min_size=1, max_size=5), max_size=3)


@settings(max_examples=400, deadline=None)
@given(text=TEXT, stops=STOPS, places=st.lists(st.integers(0, 200), max_size=30))
def test_stop_strings_do_not_depend_on_token_borders(text, stops, places):
    released, _ = stream(cut(text.encode(), places), stops)
    assert "".join(released) == first_completed(text, stops)


@settings(max_examples=200, deadline=None)
@given(text=TEXT, stops=STOPS, places=st.lists(st.integers(0, 200), max_size=30))
def test_text_is_released_as_early_as_is_safe(text, stops, places):
    """After each token: everything but half characters and a suffix that begins a stop string."""
    parts = cut(text.encode(), places)
    output = TextStream(lambda index: parts[index], stops)
    seen, released = b"", ""
    for index, part in enumerate(parts):
        seen += part
        released += output.push(index)
        if output.stopped:
            break
        whole = seen.decode(errors="ignore")
        assert whole.startswith(released)
        rest = whole[len(released) :]
        assert rest == "" or any(stop.startswith(rest) and stop != rest for stop in stops)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), places=st.lists(st.integers(0, 200), max_size=40))
def test_utf8_split_anywhere_arrives_whole(text, places):
    text = text.encode("utf-8", "ignore").decode()
    released, _ = stream(cut(text.encode(), places), [])
    assert "".join(released) == text


def test_invalid_bytes_become_replacement_characters():
    released, _ = stream([b"a\xff", b"\xc3", b"b"], [])
    assert "".join(released) == "a\ufffd\ufffdb"


def test_half_a_character_at_the_end_is_dropped():
    released, _ = stream([b"ok", "😀".encode()[:3]], [])
    assert "".join(released) == "ok"


def test_withheld_text_comes_with_the_token_that_clears_it():
    assert stream([b"x<|", b"im", b"_e", b"y"], ["<|im_end|>"])[0] == ["x", "", "", "<|im_ey"]


def test_withheld_text_comes_at_the_end():
    assert stream([b"x<|", b"im"], ["<|im_end|>"]) == (["x", "<|im"], False)


def test_longest_of_two_that_end_together_is_cut():
    assert stream([b"1 END"], ["D", " END"]) == (["1"], True)


@pytest.mark.parametrize(
    ("parts", "text"), [([b" Hi", b" you"], "Hi you"), ([b"", b"  x"], " x"), ([b"a", b" b"], "a b")]
)
def test_sentencepiece_loses_one_leading_space(parts, text):
    assert "".join(stream(parts, [], strip_space=True)[0]) == text
