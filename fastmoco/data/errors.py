"""The error of everything that has to do with data."""


class DataError(ValueError):
    """The data cannot be used: 3 where it is bad, 2 where the wrong thing was asked for (`exit_code`)."""

    def __init__(self, message: str, exit_code: int = 3) -> None:
        super().__init__(message)
        self.exit_code = exit_code
