"""`nsagen.core.workload`, until the schedule spaces import it by that name."""

from nsagen.core.workload import *  # noqa: F403
