"""Specs: YAML files that name the attention shapes to make kernels for."""

from nsagen.spec.load import Spec, load_spec, shipped_specs
from nsagen.spec.schema import json_schema
from nsagen.spec.shape import AttentionShape

__all__ = ["AttentionShape", "Spec", "json_schema", "load_spec", "shipped_specs"]
