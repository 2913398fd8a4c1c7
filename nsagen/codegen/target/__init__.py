"""`nsagen.core.target`, until the schedule spaces import it by that name."""

from nsagen.core.target import *  # noqa: F403
