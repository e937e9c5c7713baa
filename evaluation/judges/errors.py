"""What goes wrong with a judge, apart from everything that asking one needs: imports nothing."""


class JudgeError(RuntimeError):
    """A judge cannot go on; what it has answered is kept."""
