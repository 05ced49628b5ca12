"""Bodies that every engine refuses, and the field that the answer names."""

from typing import Any

from conformance import NOW, SMOLLM2

CHAT: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"model": f"{SMOLLM2}:nobody"}, 404, "model"),
    ({"max_tokens": 10**6}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": -1, "stream": True}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"frequency_penalty": 3}, 400, "frequency_penalty"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logit_bias": {"-1": 1}}, 400, "logit_bias"),
    ({"n": 10**4}, 400, "n"),
    ({"stop": [""]}, 400, "stop"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"author": {"role": "user"}, "content": [{"type": "text", "text": "q"}]}]}, 400, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, 400, "messages[0].tool_call_id"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"tools": [NOW]}, 400, "tools"),
    ({"tools": []}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "car"}}}}, 400,
     "response_format"),
    ({"tools": [NOW], "tool_choice": "required", "response_format": {"type": "json_object"}}, 400,
     "response_format"),
    ({"reasoning_effort": "low"}, 400, "reasoning_effort"),
    ({"store": True}, 400, "store"),
    ({"prediction": {"type": "content", "content": "x"}}, 400, "prediction"),
    ({"guided_regex": "a"}, 400, "guided_regex"),
    ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ({"echo": True}, 400, "echo"),
]  # fmt: skip
"""Fields of `/v1/chat/completions`, status, and the field at fault."""
OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/v1/completions", {"prompt": "a", "best_of": 2}, "best_of"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/embeddings", {"input": "a", "dimensions": 4}, "dimensions"),
    ("/v1/embeddings", {"input": ""}, "input"),
    ("/v1/embeddings", {}, "input"),
    ("/tokenize", {"prompt": "a", "x": 1}, "x"),
    ("/detokenize", {"tokens": [10**7]}, "tokens"),
]
