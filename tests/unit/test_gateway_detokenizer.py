"""Streaming text: never half a character, never past a stop string, exact however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.gateway.detokenizer import Detokenizer, StopStrings
from holdfast.gateway.tokenizer import Tokenizer
from support.gateway import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stream(tokenizer: Tokenizer, token_ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 260)), st.booleans())
def test_pieces_are_the_text_of_any_tokens(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
    whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, token_ids, skip=skip)) == whole


@given(st.text(alphabet="aé漢\U0001f642\U0001f468\u200d\U0001f469"))
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text))
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, list("\U0001f642".encode())) == ["", "", "", "\U0001f642", ""]
    assert stream(tokenizer, list("\U0001f642".encode())[:2]) == ["", "", "\ufffd"]


def reference_cut(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The stop string that is complete first ends the text; the longer one of two that end together."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4)),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_cut_alike_wherever_pieces_end(pieces: list[str], stops: list[str], include: bool) -> None:
    machine = StopStrings(stops, include=include)
    text = ""
    for piece in pieces:
        text += machine.push(piece)
        if machine.found is not None:
            break
    text += machine.flush()
    assert (text, machine.found) == reference_cut("".join(pieces), stops, include=include)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    machine = StopStrings(["<end>"], include=False)
    assert [machine.push(piece) for piece in ("a<", "e", "x<en", "d", ">z")] == ["a", "", "<ex", "", ""]
    assert machine.found == "<end>"
    assert machine.flush() == ""


def test_a_stop_string_before_min_tokens_does_not_count() -> None:
    machine = StopStrings(["ab"], include=False)
    assert machine.push("ab", may_stop=False) == "ab"
    assert machine.found is None
    assert machine.push("cab") == "c"
    assert machine.found == "ab"


def test_without_stop_strings_nothing_is_held_back() -> None:
    machine = StopStrings([], include=False)
    assert machine.push("anything") == "anything"
