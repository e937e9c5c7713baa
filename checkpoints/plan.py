"""Which source tensor fills which target tensor, settled and checked before anything is written."""

from dataclasses import dataclass, field

import torch

from perceptiondlm.checkpoints.files import DTYPES, Checkpoint, StoredTensor, name_some
from perceptiondlm.checkpoints.layouts import Rule, rename


@dataclass
class Plan:
    """The conversion of one or more checkpoints.

    Args:
        used: target name to (checkpoint, source name).
        dropped: source name to the reason it is left out.
        fresh: target names that no source holds and that are initialised anew.
    """

    used: dict[str, tuple[Checkpoint, str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def add(self, source: Checkpoint, rules: tuple[Rule, ...]) -> None:
        """Assign every tensor of a source by its rules; a tensor without a rule is an error."""
        unknown = []
        for name in source.tensors:
            result = rename(name, rules)
            if result is None:
                unknown.append(name)
            elif isinstance(result, Rule):
                self.dropped[name] = result.reason
            elif result in self.used:
                raise ValueError(f"{self.used[result][1]} and {name} would both become {result}")
            else:
                self.used[result] = (source, name)
        if unknown:
            raise ValueError(f"{source.folder} holds {name_some(unknown)} that this kind of checkpoint does not have")

    def stored(self, target: str) -> StoredTensor:
        """What a target tensor is made of."""
        source, name = self.used[target]
        return source.tensors[name]

    def check(
        self, expected: dict[str, tuple[int, ...]], fresh_prefixes: tuple[str, ...], growing: tuple[str, ...]
    ) -> None:
        """Compare with the target's tensors; what is missing becomes fresh where allowed.

        Args:
            expected: name and shape of every target tensor.
            fresh_prefixes: beginnings of names that may be initialised anew.
            growing: names of vocabularies, which may have fewer rows than the target.
        Raises:
            ValueError: for missing, superfluous or misshapen tensors.
        """
        superfluous = [self.used[name][1] for name in self.used if name not in expected]
        if superfluous:
            raise ValueError(f"the source holds {name_some(superfluous)} that its config does not call for")
        absent = [name for name in expected if name not in self.used]
        self.fresh = [name for name in absent if name.startswith(fresh_prefixes)]
        missing = [name for name in absent if name not in self.fresh]
        if missing:
            raise ValueError(f"the source does not fill {name_some(missing)} of the target")
        wrong = []
        for name in expected.keys() & self.used.keys():
            found, wanted = self.stored(name).shape, tuple(expected[name])
            fits = found[1:] == wanted[1:] and found[0] <= wanted[0] if name in growing else found == wanted
            if not fits:
                wrong.append(f"{self.used[name][1]} is {found}, expected {wanted}")
        if wrong:
            raise ValueError(f"shapes disagree with the config: {'; '.join(sorted(wrong)[:5])}")

    def dtype(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype of the target: the one asked for, or the one that all used tensors share."""
        found: dict[str, str] = {}
        for source, name in self.used.values():
            found.setdefault(source.tensors[name].dtype, name)
        foreign = [f"{name} is {dtype}" for dtype, name in found.items() if dtype not in DTYPES]
        if foreign:
            raise ValueError(f"{'; '.join(foreign)}; accepted dtypes: {', '.join(DTYPES)}")
        if wanted is not None:
            return wanted
        if len(found) > 1:
            listed = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            raise ValueError(f"the tensors have different dtypes: {listed}; choose one with --dtype")
        return DTYPES[next(iter(found))]
