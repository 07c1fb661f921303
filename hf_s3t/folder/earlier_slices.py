"""Digests of slices as format 1 wrote them into the records of stages, translated where a record is read."""

from collections.abc import Mapping
from typing import Any

from ..records.earlier import earlier_slice_digest
from ..records.examples import ExampleTable


class EarlierSlices:
    """
    Digests of slices as format 1 made them, each with the digest that the same rows have now.

    Records of stages and checkpoints are never written anew, so a system that was made in format 1 keeps this for
    good. A digest without a translation stays as it is, and fits no slice: what saw other rows stays condemned.

    Args:
        known (mapping from `str` to `str`): What is known of them.
    """

    def __init__(self, known: Mapping[str, str]):
        self._now = dict(known)

    def learn(self, table: ExampleTable) -> bool:
        """
        Know the slices of a table.

        Args:
            table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.

        Returns:
            `bool`: Whether one of them was not known.
        """
        known = set(self._now.values())
        places = ((shard, slice_) for shard in range(table.num_shards) for slice_ in range(table.num_slices))
        new = {
            earlier_slice_digest(table, *place): digest
            for place in places
            if (digest := table.slice_digest(*place)) not in known
        }
        self._now |= new
        return bool(new)

    def take_in(self, known: Mapping[str, str]) -> None:
        """Know what another copy of the system knows."""
        self._now = {**known, **self._now}

    def copy(self) -> "EarlierSlices":
        """The same, to take in more."""
        return EarlierSlices(self._now)

    def digest_now(self, digest: str) -> str:
        """The digest that the rows of a slice have now, of which a file says another."""
        return self._now.get(digest, digest)

    def translated(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What was written down of a stage or a checkpoint, its slices as their digests are now."""
        slices = record.get("slices")
        if not self._now or not isinstance(slices, list):
            return dict(record)
        return {**record, "slices": [self.digest_now(s) if isinstance(s, str) else s for s in slices]}

    def to_record(self) -> dict[str, str]:
        """What `s3t_config.json` says of them."""
        return dict(sorted(self._now.items()))
