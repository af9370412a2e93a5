"""The HTTP interface. Knows no Ray: what answers is handed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any, Protocol

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from condu_ray import __version__
from condu_ray.config import ServeConfig
from condu_ray.errors import NotFound
from condu_ray.reports import task_rows, version_rows
from condu_ray.serving.guard import Count, Guard
from condu_ray.serving.messages import Asking, Reply, Standing
from condu_ray.serving.problems import MEDIA_TYPE, Problem
from condu_ray.serving.questions import PredictBody, PredictForm, read
from condu_ray.store import Store
from condu_ray.tracking.history import accuracy_matrix, histories

PAGE = {"index.html": "text/html", "app.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}

PROBLEMS = (400, 401, 403, 404, 405, 413, 415, 422, 429, 500, 503)


class Backend(Protocol):
    """What answers."""

    async def answer(self, asking: Asking) -> Reply:
        """Raises Problem where nobody can answer."""

    def standings(self) -> Sequence[Standing]:
        """What each replica said last; empty while none is up."""


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class Label(BaseModel):
    """A label of the answer's label space."""

    label: str
    task: str | None
    probability: float


class Vote(BaseModel):
    """One voter's share; task null: the base model."""

    task: str | None
    similarity: float | None
    weight: float


class Answer(Label):
    """What a picture shows, as `condu-ray predict --json` says it."""

    image: str
    labels: list[Label]
    votes: list[Vote]
    label_space: str
    strangeness: float | None
    version: int


class Predicted(BaseModel):
    """Answers in the order of the pictures, all by one version. milliseconds: decode, wait (for a batch), model."""

    answers: list[Answer]
    version: int
    milliseconds: dict[str, float]


def build(
    config: ServeConfig,
    store: Store,
    backend: Backend,
    count: Count,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """The application. store: read for tasks and versions. count: see `Guard`. lifespan: of what answers."""
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": ProblemDetails, "content": {MEDIA_TYPE: {}}} for status in PROBLEMS
    }
    api = FastAPI(
        title="condu-ray",
        version=__version__,
        summary="A CLIP model that keeps learning: the vote of the nearest experts.",
        docs_url=None,  # FastAPI's page loads its scripts from another host; ours shows openapi.json
        redoc_url=None,
        lifespan=lifespan,
        responses=problems,
    )
    api.add_middleware(Guard, config=config, count=count)
    if config.origins:  # outside the guard: browsers ask for leave without a token
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _add_problems(api)

    for routes in (_predict(config, backend), _catalogue(store, backend), _health(backend), _page()):
        api.include_router(routes)
    return api


def _predict(config: ServeConfig, backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.post(
        "/v1/predict",
        response_model=Predicted,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {"schema": _schema(PredictForm)},
                    "application/json": {"schema": _schema(PredictBody)},
                },
            }
        },
    )
    async def predict(request: Request) -> Any:
        """What pictures show, by the vote of the nearest experts, or by one task's expert, or among given labels."""
        reply = await backend.answer(await read(request, config))
        if reply.refused:
            raise Problem(422, reply.refused)
        if reply.late:
            raise Problem(503, "too many pictures are waiting", busy=True)
        return JSONResponse({"answers": reply.answers, "version": reply.version, "milliseconds": reply.milliseconds})

    return routes


def _catalogue(store: Store, backend: Backend) -> APIRouter:
    routes = APIRouter()

    @lru_cache(maxsize=32)  # versions never change
    def tasks_of(version: int) -> dict[str, Any]:
        manifest = store.manifest(version)
        rows = task_rows(manifest)
        for row, card in zip(rows, manifest.tasks, strict=True):
            del row["source"]  # a path of the machine that learned it
            counts = store.get(manifest.objects[f"prototypes-{card.uid}"])["counts"].tolist()
            row["prototypes"] = [{"label": n, "pictures": c} for n, c in zip(card.classes, counts, strict=True)]
        return {"version": version, "tasks": rows}

    @routes.get("/v1/tasks")
    async def tasks(version: int | None = Query(default=None, ge=1, le=2**31)) -> dict[str, Any]:
        """What a version has learned, how much of it is left, and its class prototypes [default: what serves]."""
        number = version or _served(backend)
        if number is None:
            raise Problem(503, "no version is loaded yet", busy=True)
        try:
            if number != _served(backend) and number not in await run_in_threadpool(store.versions):
                raise Problem(404, f"there is no version {number}")  # gc has removed it, and what it held
            return await run_in_threadpool(tasks_of, number)
        except NotFound:
            raise Problem(404, f"there is no version {number}") from None

    def history() -> dict[str, Any]:
        manifests = []
        for number in store.versions():
            with suppress(NotFound):  # gc has removed it meanwhile
                manifests.append(store.manifest(number))
        matrix = accuracy_matrix(manifests)
        return {
            "versions": version_rows(manifests),
            "accuracy": matrix and matrix.to_json(),
            "histories": histories(manifests),
        }

    @routes.get("/v1/versions")
    async def versions() -> dict[str, Any]:
        """All versions, the one that serves, the accuracy matrix and each task's accuracy over the versions."""
        return {"serving": _served(backend), **await run_in_threadpool(history)}

    return routes


def _health(backend: Backend) -> APIRouter:
    routes = APIRouter()

    @routes.head("/healthz", include_in_schema=False)
    @routes.get("/healthz")
    async def healthy() -> dict[str, str]:
        """Whether this process runs."""
        return {"status": "ok"}

    def fault(standing: Standing, request: Request) -> str | None:
        known = request.scope["trusted"]  # a sentence may name paths
        return standing.fault if known or standing.fault is None else "a newer version cannot be loaded"

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz")
    async def ready(request: Request) -> dict[str, Any]:
        """Whether pictures are answered, and by which version on each replica; fault: why a newer does not serve."""
        standings = backend.standings()
        if not standings:
            raise Problem(503, "no replica is up yet", busy=True)
        return {
            "status": "fault" if any(each.fault for each in standings) else "ok",
            "serving": _served(backend),
            "newest": max((each.newest for each in standings if each.newest), default=None),
            "replicas": [
                {"replica": each.replica, "version": each.version, "fault": fault(each, request), "shadow": each.shadow}
                for each in standings
            ],
        }

    return routes


def _page() -> APIRouter:
    routes = APIRouter()
    page = files("condu_ray.serving") / "page"
    content = {name: (page / name).read_bytes() for name in PAGE}  # only these, whatever is asked for

    @routes.head("/", include_in_schema=False)
    @routes.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(content["index.html"], media_type="text/html")

    @routes.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in content:
            raise Problem(404, "there is no such page")
        return Response(content[name], media_type=PAGE[name])

    return routes


def _served(backend: Backend) -> int | None:
    """The version that answers now."""
    return max((each.version for each in backend.standings()), default=None)


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    if kind is PredictForm:
        schema["properties"]["image"]["items"] = {"type": "string", "format": "binary"}
    return schema


def _add_problems(api: FastAPI) -> None:
    """Every error in one form, FastAPI's own too."""

    @api.exception_handler(Problem)
    async def ours(request: Request, problem: Problem) -> Response:
        return problem.response(request.scope["request_id"])

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        told = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors()[:5])
        return Problem(422, told).response(request.scope["request_id"])

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        return Problem(error.status_code, str(error.detail), headers=headers).response(request.scope["request_id"])
