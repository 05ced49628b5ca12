from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_apps.stops import TextStream


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer of bytes: the hardest case, every Japanese character is three tokens."""
    return bytes(token_ids).decode("utf-8", errors="replace")


def push_one_by_one(stream: TextStream, text: str) -> list[str]:
    return [stream.push([byte]) for byte in text.encode()]


def test_a_japanese_character_comes_whole() -> None:
    stream = TextStream(decode_bytes)
    assert push_one_by_one(stream, "研ぎ") == ["", "", "研", "", "", "ぎ"]


def test_broken_bytes_come_out_at_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push([byte]) for byte in b"a\xe7\xa0"] == ["a", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_is_found_across_tokens_and_not_sent() -> None:
    stream = TextStream(decode_bytes, ["END"])
    assert "".join(push_one_by_one(stream, "one ENDtwo")) == "one "
    assert stream.stopped_by == "END"
    assert stream.finish() == ""
    assert stream.num_tokens == len("one END")


def test_what_only_looked_like_a_stop_string_is_sent() -> None:
    stream = TextStream(decode_bytes, ["ENDE"])
    assert push_one_by_one(stream, "xEND") == ["x", "", "", ""]
    assert stream.push(b".") == "END."


def test_a_held_beginning_is_sent_at_the_end() -> None:
    stream = TextStream(decode_bytes, ["ENDE"])
    stream.push(b"xEN")
    assert stream.finish() == "EN"


def test_the_first_of_several_stop_strings_ends_it() -> None:
    stream = TextStream(decode_bytes, ["c", "bc"])
    assert stream.push(b"abcd") == "a"
    assert stream.stopped_by == "bc"


def test_a_stop_string_within_one_push_drops_the_rest() -> None:
    stream = TextStream(decode_bytes, ["\n"])
    assert stream.push(b"one\ntwo") == "one"
    assert stream.num_tokens == 4


def test_a_stop_string_waits_for_min_tokens() -> None:
    stream = TextStream(decode_bytes, ["b"], min_tokens=3)
    assert "".join(push_one_by_one(stream, "abcdbe")) == "abcd"
    assert stream.stopped_by == "b"
    # none of a stop string may lie within the first tokens: "bc" does here
    late = TextStream(decode_bytes, ["bc"], min_tokens=2)
    assert "".join(push_one_by_one(late, "abcbc.")) == "abc"
    assert late.stopped_by == "bc"


def words_with_spaces(token_ids: Sequence[int]) -> str:
    """A decoder that, like sentencepiece, drops the space in front of the first token."""
    return " ".join("wxyz"[i] for i in token_ids)


def test_spaces_between_tokens_survive() -> None:
    stream = TextStream(words_with_spaces)
    assert "".join(stream.push([i]) for i in (0, 1, 2, 3)) == "w x y z"


@pytest.mark.parametrize("decode", [decode_bytes], ids=["bytes"])
@given(
    text=st.text(max_size=40),
    stops=st.lists(st.text(min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 7), max_size=60),
)
def test_any_pieces_give_the_text_up_to_the_first_stop(
    decode: Callable[[Sequence[int]], str], text: str, stops: list[str], cuts: list[int]
) -> None:
    stream, token_ids, out = TextStream(decode, stops), list(text.encode()), ""
    for cut in [*cuts, len(token_ids)]:
        out += stream.push(token_ids[:cut])
        token_ids = token_ids[cut:]
    out += stream.finish()
    assert out == text[: stream_end(text, stops)]


def stream_end(text: str, stops: list[str]) -> int:
    """Where an answer ends that is read character by character: at the first stop that is complete."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return min(begins)
    return len(text)
