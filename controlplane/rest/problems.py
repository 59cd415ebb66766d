"""Every error of the REST API as RFC 9457 problem details, ``application/problem+json``:
``{type, title, status, detail, errors: [{pointer, message}]}``. Nothing of the server's inside is ever told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from controlplane.domain.names import printable
from controlplane.domain.problems import Problem, pointer_to

MEDIA_TYPE = "application/problem+json"
_MAX_ERRORS = 100


class ApiProblem(HTTPException):
    """An answer that is an error. ``slug`` names the kind of problem for programs (``urn:slmfleet:problem:<slug>``);
    "" when the status says it all."""

    def __init__(
        self,
        status: int,
        detail: str,
        slug: str = "",
        errors: Iterable[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail, dict(headers) if headers else None)
        self.slug = slug
        self.errors = tuple(errors)


def not_found(kind: str, name: str) -> ApiProblem:
    """404 for an object that is not there."""
    return ApiProblem(404, f"there is no {kind} {name}", "not-found")


def invalid(errors: Iterable[Problem], slug: str = "invalid") -> ApiProblem:
    """422 for input that is wrong in the given places."""
    found = tuple(errors)
    first = found[0]
    where = f"{printable(first.pointer)}: " if first.pointer else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return ApiProblem(422, f"{where}{first.message}{more}", slug, found)


def body_of(status: int, detail: str, slug: str = "", errors: Iterable[Problem] = ()) -> dict[str, Any]:
    """The problem object itself."""
    try:
        title = HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    body: dict[str, Any] = {
        "type": f"urn:slmfleet:problem:{slug}" if slug else "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
    }
    listed = [{"pointer": problem.pointer, "message": problem.message} for problem in errors]
    if listed:
        body["errors"] = listed[:_MAX_ERRORS]
    return body


def response(problem: ApiProblem) -> JSONResponse:
    """The problem as an HTTP answer."""
    body = body_of(problem.status_code, str(problem.detail), problem.slug, problem.errors)
    return JSONResponse(body, problem.status_code, problem.headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Turn the errors of ``app`` and of its framework into problems. What nobody expected is the guard's."""
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiProblem):
        return response(error)
    if error.status_code == 400 and (why := _why_unread(error.__cause__)):
        return response(_no_json(why))
    details = {
        404: f"there is nothing at {request.url.path}: the API is described at /docs",
        405: f"{request.method} is not allowed at {request.url.path}",
    }
    detail = details.get(error.status_code, str(error.detail))
    return response(ApiProblem(error.status_code, detail, headers=error.headers))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    for item in error.errors():
        if item["type"] == "json_invalid":
            what, (_, position) = item["ctx"]["error"], item["loc"]
            return response(_no_json(f"{what[:1].lower()}{what[1:]} at {_place(str(error.body), position)}"))
    return response(invalid([_from_pydantic(item) for item in error.errors()]))


def _no_json(why: str) -> ApiProblem:
    """400 for a body that could not even be read."""
    return ApiProblem(400, f"the body is no JSON: {why}", "invalid-json")


def _place(text: str, position: int) -> str:
    """As editors count: both from 1."""
    before = text[:position]
    return f"line {before.count(chr(10)) + 1}, column {position - before.rfind(chr(10))}"


def _why_unread(cause: BaseException | None) -> str:
    """What Python's reader of JSON stumbles over before it looks for JSON; "" when it was something else."""
    match cause:
        case UnicodeDecodeError():
            return f"its byte {cause.start + 1} is not UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case ValueError():
            return "a number in it has too many digits"
        case _:
            return ""


def _from_pydantic(item: Mapping[str, Any]) -> Problem:
    place, *path = item["loc"]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing" and not path:
        return Problem("", "the body is missing: send JSON")
    if item["type"] == "extra_forbidden":
        message = "this field is not known: remove it"
    elif item["type"] == "missing":
        path, message = path[:-1], f"{path[-1]} is missing"
    elif item["type"] in ("model_attributes_type", "dict_type"):
        message = "must be a JSON object"
    if place != "body":
        return Problem("", f"{place} parameter {path[0] if path else ''}: {message}")
    return Problem(pointer_to(path), message)
