"""The supported models of Transformers, as data."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What NSA needs to know about a model besides its config.

    Attributes:
        name: the prefix of its classes in Transformers.
        module: their module, below `transformers.models`.
        config: the class of its config, if other than `<name>Config`.
        projections: those of queries, keys and values, or the joined one, of an attention module.
        norm: what its q_norm and k_norm apply to: "each head" or "all heads"; None without them.
    """

    name: str
    module: str
    config: str = ""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    norm: str | None = None

    def kind(self, suffix: str) -> Any:
        """A class of the model, such as its "Attention"; None if there is none."""
        home = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        return getattr(home, self.name + suffix, None)

    @property
    def config_class(self) -> Any:
        home = importlib.import_module(f"transformers.models.{self.module}")
        return getattr(home, self.config or f"{self.name}Config")


MODELS = (
    Facts("Llama", "llama"),
    Facts("Mistral", "mistral"),
    Facts("Mixtral", "mixtral"),
    Facts("Qwen2", "qwen2"),
    Facts("Qwen3", "qwen3", norm="each head"),
    Facts("Qwen3Moe", "qwen3_moe", norm="each head"),
    Facts("Gemma3", "gemma3", config="Gemma3TextConfig", norm="each head"),
    Facts("Phi3", "phi3", projections=("qkv_proj",)),
    Facts("Granite", "granite"),
    Facts("Olmo2", "olmo2", norm="all heads"),
)

HEADS = {
    "AutoModel": ("TextModel", "Model"),
    "AutoModelForCausalLM": ("ForCausalLM",),
    "AutoModelForSequenceClassification": (
        "TextForSequenceClassification",
        "ForSequenceClassification",
    ),
    "AutoModelForTokenClassification": ("ForTokenClassification",),
    "AutoModelForQuestionAnswering": ("ForQuestionAnswering",),
}
"""The Auto classes, and the suffixes of the classes that they make."""


def facts_of(attention: Any) -> Facts | None:
    """The facts of an attention module's model; None for a module of another kind."""
    return next((facts for facts in MODELS if type(attention) is facts.kind("Attention")), None)
