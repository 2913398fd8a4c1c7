"""From tokens to texts: what ends an answer is cut off, and nothing else is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nsagen.serve.answers import StopTexts

TEXT = st.text("ab.", max_size=12)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3))
def test_the_text_is_cut_before_the_first_stop_however_it_arrives(
    parts: list[str], stops: list[str]
) -> None:
    whole = "".join(parts)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    cut = StopTexts(stops)
    said = "".join(cut.add(part) for part in parts)
    said += cut.add("", last=True)
    assert cut.found == bool(places)
    # A stop that ends earlier is found first, even if a longer one began before it.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not places:
        assert said == whole
    elif len(stops) == 1:
        assert said == whole[: places[0]]
    else:
        assert whole.startswith(said)
        assert len(said) <= min(ends)


def test_what_cannot_begin_a_stop_is_said_at_once() -> None:
    cut = StopTexts(["\n\n"])
    assert [cut.add(part) for part in ("one", "\n", "two\n", "\nthree")] == ["one", "", "\ntwo", ""]
    assert cut.found
    assert cut.add("more", last=True) == ""
