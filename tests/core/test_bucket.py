import pytest

from nsagen.core.errors import InvalidInputError
from nsagen.runtime import Bucket


@pytest.mark.parametrize(
    ("bucket", "tokens", "context", "covered"),
    [
        (Bucket(), 0, None, True),
        (Bucket(), 1 << 40, 5, True),
        (Bucket(tokens=(1, 8)), 1, None, True),
        (Bucket(tokens=(1, 8)), 8, None, True),
        (Bucket(tokens=(1, 8)), 9, None, False),
        (Bucket(tokens=(1, 8)), 0, None, False),
        (Bucket(tokens=(None, 8)), 0, None, True),
        (Bucket(tokens=(9, None)), 8, None, False),
        (Bucket(tokens=(9, None)), 1 << 40, None, True),
        (Bucket(context=(0, 4096)), 1, 4096, True),
        (Bucket(context=(0, 4096)), 1, 4097, False),
        (Bucket(context=(0, 4096)), 1, None, False),
        (Bucket(tokens=(1, 8), context=(9, None)), 9, 9, False),
    ],
)
def test_covers(bucket: Bucket, tokens: int, context: int | None, covered: bool) -> None:
    assert bucket.covers(tokens, context) is covered


def test_a_reversed_range_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"least <= greatest; got \(8, 1\)"):
        Bucket(tokens=(8, 1))


def test_text() -> None:
    assert str(Bucket()) == "any size"
    assert str(Bucket((1, 8), (None, 9))) == "tokens 1..8, context <= 9"
    assert str(Bucket(context=(10, None))) == "context >= 10"
