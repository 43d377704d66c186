"""Requests made up from /openapi.json, right and wrong ones: none may make the server fail, and every reply is
as the document says."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from support.service import Service

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 60


def cases(operation: APIOperation) -> st.SearchStrategy[schemathesis.Case]:
    """Requests the document allows, and where there is a body, requests it does not."""
    allowed = operation.as_strategy()
    if not operation.body:
        return allowed
    return allowed | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)


def shorten(case: schemathesis.Case) -> None:
    """What is generated shall be short; how long is not what this test is about."""
    if not isinstance(case.body, dict) or not {"prompt", "messages"} & set(case.body):
        return
    if case.operation.path in ("/v1/completions", "/v1/chat/completions"):
        asked = case.body.get("max_tokens")
        if asked is None or isinstance(asked, int):
            case.body["max_tokens"] = 2 if asked is None else min(asked, 2)


def test_no_made_up_request_makes_the_server_fail(server: Service) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 14
    operations = [
        operation for operation in operations if not operation.path.endswith("/restart")
    ]  # it does what it says
    statuses: set[int] = set()
    for operation in operations:

        @given(case=cases(operation))
        @settings(
            max_examples=EXAMPLES if operation.body else 2,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            shorten(case)
            statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

        check()
    assert {200, 400} <= statuses, "both ways were taken"
