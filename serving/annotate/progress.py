"""How far a run is: images, time left, regions per second, failures."""

import time

from tqdm.auto import tqdm


class Progress:
    """A bar over the images of a run; parts count when they are finished.

    Args:
        total: images of the run; done: those of parts that earlier runs finished.
    """

    def __init__(self, total: int, done: int = 0):
        self.regions = self.failures = 0
        self.start = time.perf_counter()
        self.bar = tqdm(desc="annotate", total=total, initial=done, unit=" images", smoothing=0.05, mininterval=0.5)

    def add(self, summary: dict[str, int]) -> None:
        """Count a finished part, see `PartResult.summary`."""
        self.regions += summary["regions"]
        self.failures += summary["failures"]
        shown = {"regions": self.regions, "regions/s": f"{self.regions_per_second:.1f}"}
        self.bar.set_postfix(shown | ({"failed": self.failures} if self.failures else {}), refresh=False)
        self.bar.update(summary["images"])

    @property
    def regions_per_second(self) -> float:
        """Of this run, since it began."""
        return self.regions / max(time.perf_counter() - self.start, 1e-9)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
