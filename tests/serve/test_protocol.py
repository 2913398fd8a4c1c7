"""Requests of OpenAI's interface, checked."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")
from pydantic import ValidationError

from nsagen.serve.protocol import CompletionRequest


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
    ids=str,
)
def test_a_prompt_is_text_or_tokens_or_several_of_these(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest(model="m", prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [1, None, [], {}, [None], [True], [1.0], ["a", 1], [1, "a"], [[1], 2], [[1, "a"]]]
)
def test_other_prompts_are_refused_for_one_reason(prompt: Any) -> None:
    """It is checked as one kind of prompt alone: for the others, each token would be an error."""
    with pytest.raises(ValidationError) as refused:
        CompletionRequest.model_validate({"model": "m", "prompt": prompt})
    (problem,) = refused.value.errors()
    assert problem["loc"][0] == "prompt"
