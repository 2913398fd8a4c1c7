"""ToyNSALlama and its parts: configurations, rope, attention, caches, generation."""

from nsagen.model.cache import KVCache, NSACache
from nsagen.model.configs import InferenceConfig, ToyLlamaConfig, ToyNSALlamaConfig
from nsagen.model.drafts import PromptLookup
from nsagen.model.nsa import NativeSparseAttention
from nsagen.model.rope import RopeConfig
from nsagen.model.sampling import SamplingConfig
from nsagen.model.sequences import NewToken
from nsagen.model.serving import ContinuousBatch
from nsagen.model.toy_llama import ToyLlama
from nsagen.model.toy_nsa_llama import ToyNSALlama

__all__ = [
    "ContinuousBatch",
    "InferenceConfig",
    "KVCache",
    "NSACache",
    "NativeSparseAttention",
    "NewToken",
    "PromptLookup",
    "RopeConfig",
    "SamplingConfig",
    "ToyLlama",
    "ToyLlamaConfig",
    "ToyNSALlama",
    "ToyNSALlamaConfig",
]
