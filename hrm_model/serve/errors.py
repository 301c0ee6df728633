"""What a client is told when it gets no answer, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A refusal: status, and a message that names the value, the limit and the remedy.

    Args:
        param: the field of the request that is wrong. code: a name for programs. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"error": {"message": self.message, "type": self._kind(), "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that come with it."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def _kind(self) -> str:
        named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}
        return named.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


FAILURES = {"timeout": 504, "stopping": 503, "internal": 500}
"""Status of each kind of hrm_model.serve.jobs.Failure."""
