from pathlib import Path

import llguidance.hf
import pytest
from tiny_models import IM_END, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from serve_apps.vocabulary import Vocabulary, vocabulary_of


def sentencepiece_tokenizer(*, has_byte_tokens: bool) -> PreTrainedTokenizerFast:
    """A unigram model of a few pieces, as rinna's and Llama-2's are."""
    pieces = ["<unk>", "</s>", "▁a", "b", "▁", "{", "}", '"', ":", "1"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] if has_byte_tokens else []
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, has_byte_tokens)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("text", ["日本語の研ぎ", "a b\n\tc", "🍣 sushi", "naïve"])
def test_the_bytes_of_a_texts_tokens_are_the_text(text: str) -> None:
    vocabulary = Vocabulary(byte_tokenizer())
    token_ids = byte_tokenizer()(text).input_ids
    assert b"".join(map(vocabulary.bytes_of, token_ids)) == text.encode()


def test_a_token_of_half_a_character_is_written_in_escapes() -> None:
    token_ids = byte_tokenizer()("研").input_ids
    assert [Vocabulary(byte_tokenizer()).text_of(token_id) for token_id in token_ids] == [r"\xe7", r"\xa0", r"\x94"]


def test_special_tokens_write_their_names_and_unknown_ids_nothing() -> None:
    vocabulary = Vocabulary(byte_tokenizer())
    assert vocabulary.text_of(IM_END) == "<|im_end|>"
    assert IM_END in vocabulary.special_token_ids
    assert vocabulary.bytes_of(300) == b""


def test_sentencepiece_tokens_write_spaces_and_bytes() -> None:
    tokenizer = sentencepiece_tokenizer(has_byte_tokens=True)
    vocabulary = Vocabulary(tokenizer)
    written = [vocabulary.bytes_of(token_id) for token_id in tokenizer.convert_tokens_to_ids(["▁a", "b", "<0xE7>"])]
    assert written == [b" a", b"b", b"\xe7"]


def test_every_token_of_the_embedded_model_is_read_as_llguidance_reads_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    theirs = llguidance.hf.from_tokenizer(tokenizer)
    ours = vocabulary_of(tokenizer)
    assert ours is vocabulary_of(tokenizer)
    assert len(tokenizer) > 40_000
    assert [i for i in range(len(tokenizer)) if ours.bytes_of(i) != theirs.decode_bytes([i])] == []
