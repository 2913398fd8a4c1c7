"""Schedules of selected attention's decode pass."""

from __future__ import annotations

from nsagen.codegen.spaces import split_kv

SPACES = (split_kv.space("selected_attention", split_kv.blocks_of_steps),)
