"""Requests made from the OpenAPI document, right ones and wrong ones: no answer is a fault of the server.

MINIFLUX_EXAMPLES says how many for each operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.generation import GenerationMode

from tests.apps.serve.conftest import Served, listening

EXAMPLES = int(os.environ.get("MINIFLUX_EXAMPLES", "3"))
OPERATIONS = (
    *(("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/v1/credits", "/v1/get_result")),
    *(("GET", path) for path in ("/v1/models/{name}", "/v1/jobs/{id}", "/v1/pictures/{name}", "/v1/jobs/{id}/events")),
    ("DELETE", "/v1/jobs/{id}"),
    *(("POST", f"/v1/images/{path}") for path in ("generations", "edits", "variations")),
    ("POST", "/v1/{model}"),
)


def test_every_operation_is_tried(shared: Served) -> None:
    paths = shared.app.openapi()["paths"]
    assert {(method.upper(), path) for path, about in paths.items() for method in about} == set(OPERATIONS)


def test_the_document_says_who_may_come_in(shared: Served) -> None:
    document = shared.app.openapi()
    schemes = document["components"]["securitySchemes"]
    assert schemes["x-key"]["name"] == "x-key" and schemes["bearer"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for about in operations.values():
            keyed = path.startswith("/v1/") and path != "/v1/pictures/{name}"
            assert bool(about.get("security")) == keyed, path
            assert ("401" in about["responses"]) == keyed, path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """A server behind a socket whose painter counts no steps, and that draws nothing large."""
    served = Served(tmp_path_factory.mktemp("quick"), pixels=2**16)
    served.painter.quick = True
    with listening(served.app) as url:
        yield served, url
    served.close()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_fault(quick: tuple[Served, str], method: str, path: str, mode: GenerationMode) -> None:
    """Every answer has a status of the document, and is none of 500 and above."""
    served, url = quick
    document = served.app.openapi()
    operation = schemathesis.openapi.from_dict(document)[path][method]
    told = document["paths"][path][method.lower()]["responses"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize="MINIFLUX_EXAMPLES" not in os.environ,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def tried(case: Case) -> None:
        answer = case.call(base_url=url, headers=served.headers)
        assert answer.status_code < 500 and str(answer.status_code) in told, (answer.status_code, answer.content[:300])

    with suppress(Unsatisfiable):  # what has no parameters cannot be asked wrongly
        tried()
