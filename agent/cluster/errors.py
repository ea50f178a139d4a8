"""What can go wrong with the API server, told apart by what the caller can do about it."""

from __future__ import annotations


class ApiError(Exception):
    """The API server did not do what was asked; `status` is 0 when it did not answer.

    `retry_after` is the number of seconds that the server asks to wait, if it does.
    """

    def __init__(
        self, message: str, status: int = 0, reason: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.reason, self.retry_after = message, status, reason, retry_after


class Unreachable(ApiError):  # noqa: N818 - named by what is the case
    """No connection, no answer in time, or an answer that is no HTTP."""


class Unauthorized(ApiError):  # noqa: N818
    """The credentials are missing or not accepted (401)."""


class NotFound(ApiError):  # noqa: N818
    """There is no such object (404)."""


class Conflict(ApiError):  # noqa: N818
    """The object exists already, or was changed meanwhile (409)."""


class Gone(ApiError):  # noqa: N818
    """The server does not know the resource version any more (410): list again."""


class Refused(ApiError):  # noqa: N818
    """Anything else that the server refuses: forbidden, invalid, overloaded; see `status` and `reason`."""


BY_STATUS: dict[int, type[ApiError]] = {401: Unauthorized, 404: NotFound, 409: Conflict, 410: Gone}
