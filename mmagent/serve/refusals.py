"""What a server says instead of an answer, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST = 1000


class Refused(Exception):
    """A request that is not served: ``status`` of HTTP, ``field`` of the request that is at fault ("" for none), a
    ``code`` for programs, and after how many seconds to come again where that may help."""

    def __init__(self, status: int, message: str, field: str = "", code: str = "", retry_after: int = 0):
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.field = _tellable(message), _tellable(field)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Refused], tuple[int, str, str, str, int]]:
        return type(self), (self.status, self.message, self.field, self.code, self.retry_after)

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body, as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.field or None, "code": self.code or None}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not read
            headers["Connection"] = "close"
        return headers


def _tellable(text: str) -> str:
    """What may hold a part of the request: half a surrogate cannot be sent, and nobody reads more than a page."""
    sent = text.encode("utf-8", "backslashreplace").decode()
    return sent if len(sent) <= _LONGEST else f"{sent[:_LONGEST]}..."


def bad(message: str, field: str = "", code: str = "") -> Refused:
    """A request that is wrong in itself: 400."""
    return Refused(400, message, field, code)
