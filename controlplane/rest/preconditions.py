"""ETag and If-Match (RFC 9110, 8.8.3 and 13.1.1): a write on an object that changed since it was read is refused."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header

from controlplane.rest.problems import ApiProblem

IfMatch = Annotated[
    str | None,
    Header(alias="If-Match", max_length=1024, description="Write only if the object's ETag is one of these."),
]


def etag(resource_version: int) -> str:
    """The ETag of an object that was written so often."""
    return f'"{resource_version}"'


def check(if_match: str | None, resource_version: int | None, what: str) -> None:
    """Return when the write may go on; ``resource_version`` None: the object does not exist.

    Raises ApiProblem 412.
    """
    if if_match is None:
        return
    wanted = {part.strip() for part in if_match.split(",")}
    if resource_version is not None and ("*" in wanted or etag(resource_version) in wanted):
        return
    if resource_version is None:
        raise ApiProblem(412, f"{what} does not exist (any more), and If-Match asks for it", "stale")
    raise ApiProblem(
        412,
        f"{what} was changed since you read it: read it again (its ETag is {etag(resource_version)} now), then write",
        "stale",
    )
