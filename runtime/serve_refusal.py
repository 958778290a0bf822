"""A request that is not answered: its status, and the error body that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from gori.errors import GoriError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "queue_full"}


class Refusal(GoriError):  # noqa: N818 (the client's request is refused; the server is well)
    """Why a request is refused, in one sentence. `param` names the field of the body that is at fault."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code or CODES.get(status)
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = KINDS.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
