"""Entry files of the remote code as modules that other libraries find again."""

import sys


def make_importable(name: str) -> None:
    """Set a module as attribute of its package, as importing it does.

    The remote-code loader leaves that out for the files it is asked for. Without it dill, by which `datasets` hashes
    what it maps with, does not find their classes and pickles them function by function, with every function they
    mention, which has no end where functions mention each other.
    """
    package, _, module = name.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], module, sys.modules[name])
