"""What OpenAI's interface sends: what is honoured, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
)

from nsagen.core.errors import InvalidInputError


def _only(*values: Any) -> BeforeValidator:
    """For a parameter that is taken with its default alone: nothing else is computed."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in values):
            shown = " or ".join("null" if one is None else repr(one) for one in values)
            raise ValueError(f"must be {shown}: no other value is computed here")
        return value

    return BeforeValidator(check)


def _kind_of_prompt(prompt: Any) -> str:
    """The kind of prompt that its first entry says; checking a long one for each takes time."""
    if not isinstance(prompt, list):
        return "text"
    kinds = {str: "texts", list: "lists of tokens"}
    return kinds.get(type(prompt[0]), "tokens") if prompt else "tokens"


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


class SamplingFields(BaseModel):
    """What both endpoints take.

    Attributes:
        temperature: 0 takes the most likely token; 1 by default.
        top_p, top_k: as in `nsagen.model.SamplingConfig`; top_k is not OpenAI's.
        seed: the same seed and prompt give the same tokens; a random one by default.
        stop: up to four texts that end the answer, which is cut before them.
        user: taken and not used.
    """

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    n: Annotated[Any, _only(None, 1)] = None
    presence_penalty: Annotated[Any, _only(None, 0, 0.0)] = None
    frequency_penalty: Annotated[Any, _only(None, 0, 0.0)] = None
    logit_bias: Annotated[Any, _only(None, {})] = None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer.

        Raises:
            InvalidInputError: an empty one.
        """
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in found:
            raise InvalidInputError("stop: must be texts; got an empty one; leave it out")
        return found

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its number of tokens.

        Raises:
            InvalidInputError: options of a stream without one.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidInputError("stream_options: needs stream=true; got none; leave it out")
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`. A prompt is a text or token numbers, or several of either."""

    prompt: Annotated[
        Annotated[StrictStr, Tag("text")]
        | Annotated[list[StrictStr], Field(min_length=1), Tag("texts")]
        | Annotated[list[StrictInt], Field(min_length=1), Tag("tokens")]
        | Annotated[list[list[StrictInt]], Field(min_length=1), Tag("lists of tokens")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = 16
    echo: Annotated[Any, _only(None, False)] = None
    logprobs: Annotated[Any, _only(None)] = None
    best_of: Annotated[Any, _only(None, 1)] = None
    suffix: Annotated[Any, _only(None)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: StrictStr


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: Annotated[Any, _only(None)] = None

    @property
    def said(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`; max_tokens is the older name of max_completion_tokens."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: Annotated[Any, _only(None, False)] = None
    top_logprobs: Annotated[Any, _only(None)] = None
    response_format: Annotated[Any, _only(None, {"type": "text"})] = None
    tools: Annotated[Any, _only(None, [])] = None
    tool_choice: Annotated[Any, _only(None, "none")] = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; None if the request does not say.

        Raises:
            InvalidInputError: it says it twice.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidInputError(
                "max_tokens: is the older name of max_completion_tokens; got both; leave one out"
            )
        return self.max_completion_tokens or self.max_tokens
