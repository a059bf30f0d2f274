"""Requests and answers in JSON: bounded on the way in, one shape of error on the way out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sosa_stream.daemon.schema import json_line

SCHEMA_VERSION = 1
MAX_BODY_BYTES = 1_000_000
BODY_SECONDS = 10.0
"""A body that takes longer to come is not waited for."""


def answer(values: Mapping[str, Any], status: int = 200) -> Response:
    """One JSON object. Numbers that are not finite are the strings NaN, Infinity and -Infinity."""
    body = json_line({"schema_version": SCHEMA_VERSION, **values})
    return Response(body.encode(errors="replace"), status, media_type="application/json")


def error(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """``{"error": a sentence}``."""
    return Response(json_line({"error": text}).encode(errors="replace"), status, headers, "application/json")


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        HTTPException: 413 it is too long, 408 too slow, 400 no JSON object.
    """
    too_long = HTTPException(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
    if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_long
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(408, f"the body has not come within {BODY_SECONDS:g} s") from None
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can say half a character, which no store takes
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise HTTPException(400, "the body must be a JSON object")
    return value


def text_of(body: Mapping[str, Any], name: str, *, default: str | None = None, most: int = 2048) -> str:
    """A text in a body.

    Raises:
        HTTPException: 422 it is missing, no text, or too long.
    """
    value = body.get(name, default)
    if not isinstance(value, str) or len(value) > most or (default is None and not value):
        raise HTTPException(422, f"{name} must be a text of at most {most} characters")
    return value


def number_of(request: Request, name: str, default: int, most: int) -> int:
    """A whole number in a query.

    Raises:
        HTTPException: 422 it is none, or out of bounds.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or not 1 <= int(text) <= most:
        raise HTTPException(422, f"{name} must be a whole number from 1 to {most}")
    return int(text)


def choice_of(request: Request, name: str, choices: tuple[str, ...]) -> str | None:
    """One of a closed set in a query, or None where the query does not ask.

    Raises:
        HTTPException: 422 it is none of these.
    """
    text = request.query_params.get(name)
    if text is not None and text not in choices:
        raise HTTPException(422, f"{name} must be one of {', '.join(choices)}")
    return text
