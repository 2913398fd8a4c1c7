"""A template's header says what only the template knows; spaces describe knobs, once."""

from __future__ import annotations

import re

import pytest
from jinja2 import meta

from nsagen.codegen.space import ScheduleSpace
from nsagen.codegen.template import environment, spaces_of
from nsagen.core.paths import templates_dir
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import PARAMETERS, STATIC_PARAMS, Workload, parameter_names
from nsagen.spec import load_spec, shipped_specs

SPACES = {space.template: space for key in STATIC_PARAMS for space in spaces_of(*key)}

GATED = Workload.of(
    "compress",
    "backward",
    dtype="bfloat16",
    compress_type="sigmoid_mul",
    head_dim=128,
    kernel_size=32,
    kernel_stride=16,
    with_pe=True,
)

FORCED = Workload.of(
    "sliding_window_attention",
    "forward",
    dtype="bfloat16",
    **{"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "window_size": 512},
    **{"block_size": 64, "init_blocks": 1, "local_blocks": 2},
)

SHIPPED = (w for name in shipped_specs() for w in load_spec(name).workloads())
WORKLOADS = (*SHIPPED, GATED, FORCED)


def sources(template: str) -> dict[str, str]:
    """Name -> text of a template and of all that it includes."""
    found, pending = dict[str, str](), [template]
    while pending:
        name = pending.pop()
        found[name] = (templates_dir() / name).read_text(encoding="utf-8")
        pending += filter(None, meta.find_referenced_templates(environment().parse(found[name])))
    return found


def derived(space: ScheduleSpace) -> set[str]:
    """The names that the space computes for a workload that a shipped spec has."""
    target = KNOWN_TARGETS["cuda:90"]
    workload: Workload = next(
        w for w in WORKLOADS if (w.op, w.pass_) == (space.op, space.pass_) and space.supports(w)
    )
    return set(space.derive(workload, space.default_schedule(workload, target)))


@pytest.mark.parametrize("template", SPACES)
def test_a_header_names_what_the_space_derives_and_nothing_that_it_describes(template: str) -> None:
    space = SPACES[template]
    head = sources(template)[template].partition("#}")[0]
    section = head.partition("\nDerived:\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^  (\w+(?:, \w+)*): ", section, re.M)
    parsed = (environment().parse(text) for text in sources(template).values())
    used = set[str]().union(*map(meta.find_undeclared_variables, parsed))
    assert {name for row in rows for name in row.split(", ")} == derived(space) & used
    knobs = {knob.name for knob in space.knobs}
    parameters = parameter_names(space.op, space.pass_)
    assert not re.search(rf"^  ({'|'.join((*knobs, *parameters))}): ", head, re.M)


def test_each_static_parameter_and_knob_is_described() -> None:
    assert {name for key in STATIC_PARAMS for name in parameter_names(*key)} == set(PARAMETERS)
    assert all(knob.trades for space in SPACES.values() for knob in space.knobs)


ONE_KERNEL = {
    "block_selection/decode_split_keys.py.j2": "the split, score and choose kernels of one step",
    "compressed_attention/decode_split_kv.py.j2": "one loop, over pages and narrow caches too",
    "native_sparse_attention/decode_split_kv.py.j2": "one loop over selected blocks and window",
    "selected_attention/decode_split_kv.py.j2": "one loop, over pages and narrow caches too",
    "selected_attention/pipeline_key_blocks.py.j2": "warps of one kernel, which share its memory",
}
"""Templates past 300 lines -> why the whole is one kernel. Others move shared parts out."""


def test_a_template_past_300_lines_is_one_kernel() -> None:
    paths = templates_dir().rglob("*.j2")
    lines = {str(p.relative_to(templates_dir())): len(p.read_text().splitlines()) for p in paths}
    assert ONE_KERNEL.keys() <= lines.keys()
    assert {name for name, n in lines.items() if n > 300} <= ONE_KERNEL.keys()
