"""What every stage is, and how one is made from a section of a YAML file."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from perceptiondlm.data_engine.record import Changes, Record


# Of a setting that says how a stage works (speed, place, device), not what it gives: it may change between runs.
HOW = {"changes_output": False}


@dataclass
class Stage(ABC):
    """A step from records to changes. Its fields are its settings; a subclass adds its own and sets `kind`.

    A stage must give the same changes whenever it sees the same record, whatever stands beside it in a batch: then a
    run that was killed and goes on gives what an undisturbed run gives.

    Attributes:
        kind: its name in YAML files and, unless `name` is given, in records.
    """

    kind: ClassVar[str]
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or self.kind
        self.check()

    def check(self) -> None:  # noqa: B027
        """Raise ValueError for settings that cannot work, before any work is done; opens nothing large."""

    def open(self) -> None:  # noqa: B027
        """Load what `run` needs; may be called again, and then does nothing."""

    def finish(self) -> None:  # noqa: B027
        """Let go of what `open` loaded."""

    @abstractmethod
    def run(self, records: Sequence[Record]) -> list[Changes]:
        """Changes of every record, in order; only regions that are kept may be changed."""

    def settings(self) -> dict[str, Any]:
        """What determines the stage's changes, JSON-ready."""
        fields = [item.name for item in dataclasses.fields(self) if item.metadata.get("changes_output", True)]
        return {"kind": self.kind, **{name: getattr(self, name) for name in fields}}

    def report(self) -> dict[str, Any]:
        """What the stage knows of its own work, such as tokens and costs; JSON-ready."""
        return {}


class RegionStage(Stage):
    """A stage that looks at one record at a time."""

    @abstractmethod
    def look(self, record: Record) -> Changes:
        """Changes of a record with at least one kept region."""

    def run(self, records: Sequence[Record]) -> list[Changes]:
        return [self.look(record) if record.kept else {} for record in records]


def check_share(stage: str, **shares: float) -> None:
    """Raise ValueError for settings that are no shares in [0, 1]."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{stage}: {name} must be in [0, 1], got {share}")
