"""What training has cost so far, unit by unit, in a file that outlives the process."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import FolderError
from ..folder.files import read_checked_json, write_checked_json
from ..folder.layout import COST_FILE
from ..folder.system import SystemFolder


@dataclass(frozen=True)
class UnitCost:
    """
    What one unit of training cost: a stage, a slice or a shard, whatever a method trains in one go.

    Args:
        unit (`str`): Its address, such as `"shard-0/2-0"`: the shard and the slices that it has learnt.
        seconds (`float`): Duration of the training, without evaluations before and after. Of a unit that was resumed
            from a checkpoint inside it, the last session.
        steps (`int`): Optimizer steps.
        examples (`int`): Examples seen, with repeats.
    """

    unit: str
    seconds: float
    steps: int
    examples: int


@dataclass(frozen=True)
class Cost:
    """
    What training cost, summed over units.

    Args:
        units (`tuple[UnitCost, ...]`): The units in the order in which they were trained; one that was trained again
            is there again.

    Example:

    ```python
    >>> from hf_s3t.baselines.cost import Cost, UnitCost

    >>> cost = Cost((UnitCost("shard-0/0", 1.5, 10, 40), UnitCost("shard-0/0-1", 2.5, 20, 80)))
    >>> cost.seconds, cost.steps, cost.examples
    (4.0, 30, 120)
    ```
    """

    units: tuple[UnitCost, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return sum(unit.seconds for unit in self.units)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return sum(unit.steps for unit in self.units)

    @property
    def examples(self) -> int:
        """Examples seen, with repeats."""
        return sum(unit.examples for unit in self.units)

    def since(self, earlier: "Cost") -> "Cost":
        """What came after an earlier reading."""
        return Cost(self.units[len(earlier.units) :])


def read_cost(folder: str | os.PathLike[str]) -> Cost:
    """
    What the training of a folder's system has cost so far, over all sessions.

    Args:
        folder (`str` or `os.PathLike`): The system's folder.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is damaged.
    """
    path = Path(folder) / COST_FILE
    if not path.exists():
        return Cost()
    try:
        return Cost(tuple(UnitCost(**unit) for unit in read_checked_json(path)["units"]))
    except (KeyError, TypeError) as error:
        raise FolderError(f"{path} does not say what training cost ({error}). Remove it to count anew.") from error


def add_cost(folder: SystemFolder, unit: UnitCost) -> None:
    """Note, synced, what a unit cost."""
    # Without the lock, another process that tidies the folder up would take the half-written file for a dead one's.
    with folder.writing():
        units = [*read_cost(folder.path).units, unit]
        write_checked_json(folder.path / COST_FILE, {"units": [asdict(unit) for unit in units]})
