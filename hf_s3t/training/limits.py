"""How far a call of `train` goes."""

import math
import time

from ..checks import require_int, require_positive
from ..errors import ConfigError


class Limits:
    """
    How far a run goes, from when this is made.

    Args:
        stages (`int`, *optional*): At most so many.
        seconds (`float`, *optional*): After so many no stage is begun.
    """

    def __init__(self, stages: int | None, seconds: float | None):
        try:
            if stages is not None:
                require_int("max_stages", stages, 0)
            if seconds is not None:
                require_positive("max_seconds", seconds)
        except ConfigError as error:
            raise ConfigError(f"{error} Leave it out to train all that is missing.") from None
        self._stages = math.inf if stages is None else stages
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def of(self, stages: int) -> int:
        """How many of so many stages are trained, if time does not end it."""
        return int(min(stages, self._stages))

    @property
    def seconds_left(self) -> float:
        """For how long stages may be begun."""
        return self._end - time.monotonic()

    def are_reached(self, stages: int) -> bool:
        """Whether no stage is begun any more when so many were trained."""
        return stages >= self._stages or time.monotonic() >= self._end
