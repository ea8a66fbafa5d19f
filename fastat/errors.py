"""The two kinds of error a command reports in one line."""


class UserError(ValueError):
    """The user's mistake: says what was expected and what came. Exit code 2."""


class Failure(RuntimeError):
    """Something broke that the user did not cause: a full disk, a damaged shard. Exit code 1."""
