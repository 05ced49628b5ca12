"""The bytes behind each token of a tokenizer."""

import re
from functools import cache, cached_property, lru_cache

from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A single byte in a sentencepiece vocabulary."""


class Vocabulary:
    """Tokens as the bytes that they write; decoding alone cannot say, since a token may be half a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._named = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        decoder = str(getattr(tokenizer.backend_tokenizer, "decoder", ""))
        self._is_byte_level = "ByteLevel" in decoder

    def bytes_of(self, token_id: int) -> bytes:
        """Return what the token writes; a special token writes its name, an id without a token nothing."""
        if (name := self._named.get(token_id)) is not None:
            return name.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(_byte_alphabet().get(char) or char.encode() for char in token)
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return str(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def text_of(self, token_id: int) -> str:
        r"""Return the token as OpenAI writes it: bytes that are no whole character as `\xe7\xa0`."""
        return self.bytes_of(token_id).decode(errors="backslashreplace")

    @cached_property
    def special_token_ids(self) -> list[int]:
        """Return the tokens that stand for no text."""
        added = self._tokenizer.added_tokens_decoder
        return [token_id for token_id, token in added.items() if token.special]


@lru_cache(maxsize=8)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the vocabulary of `tokenizer`, always the same one."""
    return Vocabulary(tokenizer)


@cache
def _byte_alphabet() -> dict[str, bytes]:
    """Return the byte behind each letter of GPT-2's alphabet.

    Printable bytes stand for themselves, the others for the letters from U+0100 on, in order (`encoder.py` of the
    GPT-2 release).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}
