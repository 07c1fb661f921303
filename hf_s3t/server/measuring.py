"""What is measured while the server answers, as those who feed it see it."""

from typing import Protocol


class Metrics(Protocol):
    """
    What the parts of a server report to. All are called from any thread, and must be quick.

    `server/answers.py` calls `tokens`, `first_token`; `server/batching.py` calls `batch`; the outermost layer of the
    app calls `request_done`; `server/erasures.py` calls `erasure`.
    """

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """
        A request has ended, streams with their last byte.

        Args:
            route (`str`): The path of its route as the app declares it, such as `/v1/erasures/{id}`; `""` for none.
            status (`int`): The HTTP status that was sent, of a stream that ended with an error that of the error;
                499 where the client had gone before.
            seconds (`float`): Since its first byte.
        """

    def tokens(self, prompt: int, completion: int) -> None:
        """
        An answer is complete.

        Args:
            prompt (`int`): The tokens of its prompt.
            completion (`int`): The tokens of all its choices.
        """

    def first_token(self, seconds: float) -> None:
        """
        The first token of a row was made.

        Args:
            seconds (`float`): Since its request came.
        """

    def batch(self, size: int) -> None:
        """
        A batch begins.

        Args:
            size (`int`): Its rows.
        """

    def erasure(self, examples: int, seconds: float) -> None:
        """
        A deletion is in force.

        Args:
            examples (`int`): How many examples went.
            seconds (`float`): How long it took.
        """


class NoMetrics:
    """Measures nothing."""

    def request_done(self, route: str, status: int, seconds: float) -> None:
        """Nothing."""

    def tokens(self, prompt: int, completion: int) -> None:
        """Nothing."""

    def first_token(self, seconds: float) -> None:
        """Nothing."""

    def batch(self, size: int) -> None:
        """Nothing."""

    def erasure(self, examples: int, seconds: float) -> None:
        """Nothing."""
