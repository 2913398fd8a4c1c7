"""MiniCPM4 and MiniCPM4.1 in Transformers, with InfLLM-V2 by nsagen.

Transformers has no model of the type `minicpm`, which the released folders name. Its dense
mathematics is Granite's with other names for the multipliers, so these classes are Granite's, with
a config that reads the released one. Where that has a `sparse_config`, attention is sparse.

    AutoModelForCausalLM.from_pretrained("openbmb/MiniCPM4-8B")  # not trust_remote_code
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteForCausalLM, GraniteModel

from nsagen.integrations.attention_cache import remember_caches
from nsagen.integrations.attention_interface import IMPLEMENTATION
from nsagen.model.checks import require
from nsagen.model.forms import form_of

SPARSE = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
"""A `sparse_config` as released. What one leaves out has these values."""

DERIVED = (
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_multiplier",
)
"""Granite's names for what follows from a MiniCPM's config, which is not saved."""


class MiniCPMConfig(GraniteConfig):
    """A released MiniCPM's config.

    Attributes:
        scale_emb: times the embeddings.
        scale_depth: times each residual branch, over the square root of the number of layers.
        dim_model_base: the logits are divided by hidden_size over this.
        sparse_config: InfLLM-V2's settings, by their released names: see `SPARSE`, and
            `local_blocks`, which is window_size / block_size + 1 unless given, and `package` and
            `cache_dtype`, as in `nsagen.model.forms`. None: dense.

    Raises:
        InvalidInputError: a `sparse_config` with an unknown name or a value out of its range;
            experts.
    """

    model_type = "minicpm"

    vocab_size: int = 73448
    intermediate_size: int = 16384
    tie_word_embeddings: bool = True  # where a config.json says nothing, as in its own code
    scale_emb: float | int = 1
    scale_depth: float | int = 1.0
    dim_model_base: float | int = 1
    sparse_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        experts = getattr(self, "num_experts", 0)
        where, advice = "MiniCPMConfig", "use the model's own code"
        require(not experts, where, "num_experts must be 0", str(experts), advice)
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        self.embedding_multiplier = self.scale_emb
        self.residual_multiplier = self.scale_depth / math.sqrt(self.num_hidden_layers)
        self.logits_scaling = self.hidden_size / self.dim_model_base
        self.attention_multiplier = head_dim**-0.5
        self.choose_attention()

    def __setattr__(self, name: str, value: Any) -> None:
        chosen = getattr(self, "_attn_implementation_internal", None)
        if name == "sparse_config" and value is not None and chosen not in (None, IMPLEMENTATION):
            rule = f"needs attn_implementation {IMPLEMENTATION!r}, or the model would stay dense"
            advice = f"call model.set_attn_implementation({IMPLEMENTATION!r}) first"
            require(False, "MiniCPMConfig.sparse_config", rule, repr(chosen), advice)
        super().__setattr__(name, value)

    def choose_attention(self) -> None:
        """Check the `sparse_config`, and let attention follow it unless another is asked for."""
        if self.sparse_config is not None:
            form_of("MiniCPMConfig.sparse_config", self.nsagen)
            if self._attn_implementation is None:
                self._attn_implementation = IMPLEMENTATION

    @property
    def nsagen(self) -> dict[str, Any] | None:
        """The sparse form's settings, as `nsagen.model.forms` names them."""
        if self.sparse_config is None:
            return None
        where, given = "MiniCPMConfig.sparse_config", self.sparse_config
        fits = isinstance(given, Mapping)
        require(fits, where, "must be a mapping or None", repr(given), "see docs/minicpm.md")
        names = {*SPARSE, "local_blocks", "package", "cache_dtype"}
        unknown = ", ".join(sorted(set(given) - names, key=str))
        rule = f"the settings are {', '.join(sorted(names))}"
        require(not unknown, where, rule, unknown, "correct the name, or leave it out")
        settings = {**SPARSE, **given}
        rule = "use_nope must be false: scores before rope are not computed"
        nope = settings.pop("use_nope")
        require(nope is False, where, rule, repr(nope), "leave it out")
        topk = settings["topk"]
        rule = "topk, the blocks besides the window's, must be an integer of at least 1"
        require(type(topk) is int and topk > 0, where, rule, repr(topk), "64 is as released")
        window, block = settings.pop("window_size"), settings["block_size"]
        fits = type(window) is int and type(block) is int and block > 0
        fits = fits and window >= 0 and window % block == 0
        rule = "window_size must be a multiple of block_size"
        require(fits, where, rule, f"{window} and {block}", "2048 and 64 are as released")
        blocks = window // block
        settings.setdefault("local_blocks", blocks + 1)
        # Blocks of the window come on top of those that `topk` says.
        return {"form": "infllm_v2", **settings, "topk": topk + blocks}

    def to_dict(self) -> dict[str, Any]:
        """As released: rope in two keys, nothing that follows from others, no code to run."""
        made = super().to_dict()
        for name in (*DERIVED, "auto_map"):
            made.pop(name, None)
        rope = dict(made.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            made["rope_theta"] = rope.pop("rope_theta")
        made["rope_scaling"] = None if rope.get("rope_type") in (None, "default") else rope
        return made


class _MiniCPM:
    """What the classes add to Granite's."""

    config_class = MiniCPMConfig
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.",)

    def __init__(self, config: MiniCPMConfig, *args: Any, **kwargs: Any) -> None:
        config.choose_attention()  # it may have got its sparse_config just now
        super().__init__(config, *args, **kwargs)  # pyright: ignore
        if (config.nsagen or {}).get("cache_dtype") is not None:
            remember_caches(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As Transformers', but a folder whose weights do not fit is refused.

        Raises:
            InvalidInputError: weights are missing, too many, or of another shape.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        strange = sorted(f"{k}: {name}" for k in kinds for name in info.get(k) or ())
        rule, advice = "the folder must have the model's weights", "use the model's own code"
        came = ", ".join(strange[:5])
        require(not strange, f"{cls.__name__}.from_pretrained", rule, came, advice)
        return (model, info) if output_loading_info else model


class MiniCPMModel(_MiniCPM, GraniteModel):
    """MiniCPM without a head."""

    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.", r"^lm_head\.")


class MiniCPMForCausalLM(_MiniCPM, GraniteForCausalLM):
    """MiniCPM with its head for text."""


def register() -> None:
    """Make the Auto classes open a released folder with these."""
    transformers.AutoConfig.register("minicpm", MiniCPMConfig, exist_ok=True)
    transformers.AutoModel.register(MiniCPMConfig, MiniCPMModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM, exist_ok=True)
