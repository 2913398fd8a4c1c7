"""Schedule spaces refuse what cannot run, and say why."""

import pytest

from nsagen.codegen import template
from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.core.errors import BuildError, SpecError, UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS, parse_target
from nsagen.core.workload import Schedule, Workload

WORKLOAD = Workload.of("rope", "forward", dtype="float16", head_dim=64)
SM90 = KNOWN_TARGETS["cuda:90"]


def space(default=None, **changes):
    values = {
        "op": "rope",
        "pass_": "forward",
        "algorithm": "rows",
        "knobs": (
            PowerOfTwo("block_m", 16, 64, "rows a program"),
            Knob("num_warps", (2, 4), "threads"),
        ),
        "rules": (Rule("4 warps need 32 rows", lambda w, s, t: s.block_m >= 8 * s.num_warps),),
        "default": lambda w, t: default or {"block_m": 32, "num_warps": 4},
        "shared_memory": lambda w, s: s.block_m * 4096,
    }
    return ScheduleSpace(**{**values, **changes})


def test_schedules_are_the_valid_part_of_the_cross_product():
    found = [(s.block_m, s.num_warps) for s in space().schedules(WORKLOAD, SM90)]
    assert found == [(16, 2), (32, 2), (32, 4)]  # 64 rows need 256 KiB; (16, 4) breaks the rule


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"block_m": 24, "num_warps": 2}, "knob block_m must be one of [16, 32, 64], got 24"),
        ({"block_m": 16, "num_warps": 4}, "4 warps need 32 rows"),
        ({"block_m": 64, "num_warps": 2}, "needs about 262144 bytes of shared memory"),
        ({"block_m": 16, "num_warps": 2, "depth": 1}, "knob depth is not one of this algorithm's"),
        ({"block_m": 16}, "knob num_warps must be one of [2, 4], got None"),
    ],
)
def test_a_violation_names_the_rule(knobs, reason):
    wrong = space().violations(WORKLOAD, Schedule.of("rows", knobs), SM90)
    assert any(text.startswith(reason) for text in wrong), wrong


@pytest.mark.parametrize(("value", "others"), [(True, (1, 2)), (1, (False, True))])
def test_true_is_not_1(value, others):
    """They are equal, and so one for a cache, but a kernel's text shows which it is."""
    one = space(knobs=(Knob("depth", others, "a trade"),), rules=(), shared_memory=lambda w, s: 0)
    (wrong,) = one.violations(WORKLOAD, Schedule.of("rows", depth=value), SM90)
    assert wrong == f"knob depth must be one of {list(others)}, got {value}"


def test_a_default_with_a_value_that_no_knob_has_is_a_defect_of_the_space():
    with pytest.raises(BuildError, match=r"must have known knobs.*block_m must be one of"):
        space(default={"block_m": 24, "num_warps": 4}).default_schedule(WORKLOAD, SM90)


@pytest.mark.parametrize(
    ("default", "fits"),
    [
        ((32, 4), (32, 4)),  # valid as it is
        ((16, 4), (16, 2)),  # breaks the rule; the later knob gives way
        ((64, 2), (32, 2)),  # 256 KiB; warps need none, so the earlier knob gives way
    ],
)
def test_a_default_is_made_to_fit(default, fits):
    knobs = dict(zip(("block_m", "num_warps"), default, strict=True))
    schedule = space(default=knobs).default_schedule(WORKLOAD, SM90)
    assert (schedule.block_m, schedule.num_warps) == fits


def test_what_cannot_fit_is_refused_by_name():
    large = space(shared_memory=lambda w, s: 1 << 20)
    with pytest.raises(UnsupportedWorkloadError, match="1048576 bytes of shared memory, cuda:90"):
        large.default_schedule(WORKLOAD, SM90)


def test_a_rule_that_no_schedule_meets_leaves_the_workload_to_other_algorithms(monkeypatch):
    never = space(algorithm="never", rules=(Rule("never", lambda w, s, t: False),))
    with pytest.raises(UnsupportedWorkloadError, match=r"never must have a valid schedule"):
        never.default_schedule(WORKLOAD, SM90)
    monkeypatch.setattr(template, "spaces_of", lambda op, pass_: (never, space()))
    assert template.default_schedule(WORKLOAD, SM90).algorithm == "rows"


def test_power_of_two_knobs_take_powers_of_two_only():
    assert PowerOfTwo("n", 1, 8, "").values == (1, 2, 4, 8)
    with pytest.raises(ValueError, match="powers of two"):
        PowerOfTwo("n", 3, 8, "")


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (80, 128), (128, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


@pytest.mark.parametrize("text", ["cuda:90", "cuda:80", "hip:gfx942"])
def test_known_targets_parse(text):
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(("text", "offer"), [("sm90", "cuda:90"), ("cuda:91", "cuda:90")])
def test_an_unknown_target_offers_the_nearest(text, offer):
    with pytest.raises(SpecError, match=f"did you mean '{offer}'"):
        parse_target(text)


def test_an_algorithm_of_one_architecture_is_no_choice_elsewhere(monkeypatch):
    """Preferred algorithms come first, and of them those for particular targets."""
    hopper = space(algorithm="hopper", runs_on=lambda t: t.has_wgmma)
    small = space(algorithm="small", preferred=lambda w, t: w.head_dim < 64)
    monkeypatch.setattr(template, "spaces_of", lambda op, pass_: (small, space(), hopper))

    def algorithms(name):
        return [s.algorithm for s in template.spaces_for(WORKLOAD, KNOWN_TARGETS[name])]

    assert algorithms("cuda:90") == ["hopper", "rows", "small"]
    assert algorithms("cuda:80") == ["rows", "small"]
    assert hopper.violations(WORKLOAD, hopper.default_schedule(WORKLOAD, SM90), SM90) == []
    schedule = Schedule.of("hopper", {"block_m": 32, "num_warps": 4})
    wrong = hopper.violations(WORKLOAD, schedule, KNOWN_TARGETS["cuda:80"])
    assert wrong == ["algorithm hopper does not run on cuda:80"]
