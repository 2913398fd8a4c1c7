"""Every error that nsagen raises on purpose.

The text of each has four parts: where, the rule, what came, what to do.
"""


class NsagenError(Exception):
    """Root of all errors raised by nsagen."""


class SpecError(NsagenError):
    """A spec or tuning record is invalid. Carries the file, line and key in its text."""


class InvalidInputError(NsagenError, ValueError):
    """A tensor or argument passed to an op or model breaks its contract."""


class BuildError(NsagenError):
    """Rendering, compiling or writing generated code failed."""


class TuneError(NsagenError):
    """Searching for schedules failed: no device answers, or a study or recording is unusable."""


class WorkerError(BuildError, TuneError):
    """A process that compiles or measures cannot be started, or failed at what it was asked."""


class UnsupportedWorkloadError(NsagenError, LookupError):
    """No variant covers a call, and building a missing one is turned off or impossible."""


class CapacityError(NsagenError, RuntimeError):
    """A cache has no room for a sequence now; it may have when others have ended."""


class LostRankError(NsagenError, RuntimeError):
    """Processes that take part in a distributed job are gone."""
