"""Errors as problem details (RFC 9457): one JSON object, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 1


@dataclass(eq=False)
class Problem(Exception):
    """What a client is told. status: HTTP's. detail: one sentence. busy: the same request may succeed soon."""

    status: int
    detail: str
    busy: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def response(self, request_id: str) -> JSONResponse:
        """The answer, with Retry-After where trying again makes sense."""
        headers = dict(self.headers) | ({"Retry-After": str(RETRY_SECONDS)} if self.busy else {})
        return JSONResponse(self.document(request_id), self.status, headers, MEDIA_TYPE)

    def document(self, request_id: str) -> dict[str, Any]:
        """The members of RFC 9457 (the type is about:blank: the title says all) and the request's id."""
        return {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
        }
