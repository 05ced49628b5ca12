"""A conversation with a served model, for the command line."""

import os
from collections.abc import Iterator

import openai
from openai.types.chat import ChatCompletionMessageParam

from cluster.errors import UserError
from cluster.home import KEY_VARIABLE


class EndpointError(UserError, RuntimeError):
    """The endpoint does not answer, or refuses the request."""


class Conversation:
    """Questions and answers so far; each question is sent with what was said before."""

    def __init__(self, base_url: str, model: str, *, max_tokens: int, temperature: float) -> None:
        api_key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[ChatCompletionMessageParam] = []

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece.

        Raises:
            EndpointError: nothing listens there, or the request was refused; the message is the server's.
        """
        self._messages.append({"role": "user", "content": question})
        answer = ""
        try:
            stream = self._client.chat.completions.create(
                model=self._model,
                messages=self._messages,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                stream=True,
            )
            for chunk in stream:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                answer += piece
                yield piece
        except openai.APIConnectionError as error:
            raise EndpointError(f"Nothing answers at {self._client.base_url}; start it with `kajiya up`.") from error
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            raise EndpointError(str(body.get("message") or error.message)) from error
        self._messages.append({"role": "assistant", "content": answer})
