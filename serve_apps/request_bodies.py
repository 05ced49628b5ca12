"""The bodies that routes take: the engines' request classes, without what a client can break in them."""

from typing import Annotated, Any

from pydantic import ValidatorFunctionWrapHandler, WrapValidator
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingCompletionRequest,
    TokenizeRequest,
)
from ray.llm._internal.serve.core.ingress.utils import _sanitize_chat_completion_request

from serve_apps.refusals import Refusal


def _read(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    # vLLM's own checks look at a body before pydantic has checked its types, and fall over what they do not expect.
    try:
        return handler(value)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("one of its values has another type than its field") from error


ChatBody = Annotated[ChatCompletionRequest, WrapValidator(_read)]
CompletionBody = Annotated[CompletionRequest, WrapValidator(_read)]
EmbeddingBody = Annotated[EmbeddingCompletionRequest, WrapValidator(_read)]
TokenizeBody = Annotated[TokenizeRequest, WrapValidator(_read)]


def whole_messages(body: Any) -> Any:
    """Return `body` with the parts of its messages read, which pydantic leaves in iterators that cannot be pickled.

    Raises:
        Refusal: content that is neither a text nor a list of parts, or a message of another API.
    """
    for index, message in enumerate(body.messages):
        if not isinstance(message, dict):  # vLLM's class takes those of gpt-oss, which have an author and no role
            raise Refusal(f"messages[{index}] has no role; send role and content.", param=f"messages[{index}]")
    try:
        return _sanitize_chat_completion_request(body)
    except ValueError as error:  # pydantic's, which it raises for each part when that is read
        message = "messages has content that is neither a text nor a list of parts as OpenAI's API knows them."
        raise Refusal(message, param="messages") from error
