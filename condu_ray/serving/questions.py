"""What clients may send to `POST /v1/predict`, and how it is read."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from condu_ray.config import ServeConfig
from condu_ray.serving.messages import Asking, Question
from condu_ray.serving.problems import Problem

LABEL_LENGTH, NAME_LENGTH = 200, 200
_DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,")


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    task: str | None = Field(default=None, max_length=64, description="its expert answers, among its classes")
    labels: list[str] | None = Field(default=None, min_length=1, description="answer among these words")
    top_k: int = Field(default=5, ge=1, le=1000, description="labels listed for each picture")
    k: int | None = Field(default=None, ge=1, le=64, description="most experts a picture [default: the version's own]")
    version: int | None = Field(default=None, ge=1, le=2**31, description="version that answers [default: the newest]")


class PredictBody(_Fields):
    """A request as JSON."""

    images: list[str] = Field(min_length=1, description="pictures, each base64 or a data: URL")


class PredictForm(_Fields):
    """A request as multipart/form-data; `image` and `labels` may be repeated."""

    image: list[bytes] = Field(min_length=1, description="pictures")


async def read(request: Request, config: ServeConfig) -> Asking:
    """Raises Problem for anything that is not a question within the limits."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(await request.body(), config)
    if kind == "multipart/form-data":
        try:
            form = await request.form(max_files=config.pictures + 1, max_fields=config.labels + 8)
        except HTTPException as error:
            told = str(error.detail)
            for kind, name, most in (("files", "pictures", config.pictures), ("fields", "labels", config.labels)):
                if told.startswith(f"Too many {kind}"):
                    raise Problem(422, f"more than {most} {name}: send 1 to {most}") from None
            raise Problem(400, told) from None
        except (KeyError, ValueError, UnicodeError) as error:
            raise Problem(400, f"the form cannot be read ({type(error).__name__})") from None
        try:
            return await _from_form(form, config)
        finally:
            await form.close()
    raise Problem(415, "send multipart/form-data with `image`, or application/json with `images`")


def _from_json(body: bytes, config: ServeConfig) -> Asking:
    asked = _valid(PredictBody, body)
    pictures = []
    for place, text in enumerate(asked.images):
        text = text[match.end() :] if (match := _DATA_URL.match(text)) else text
        try:
            pictures.append(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise Problem(422, f"images.{place} is not base64") from None
    return _asking([str(place) for place in range(len(pictures))], pictures, asked, config)


async def _from_form(form: FormData, config: ServeConfig) -> Asking:
    fields: dict[str, Any] = {}
    names: list[str] = []
    pictures: list[bytes] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise Problem(422, f"the file is called '{name[:NAME_LENGTH]}': call it image")
            names.append((value.filename or str(len(names)))[:NAME_LENGTH])
            pictures.append(await value.read())
        elif name == "labels":
            fields.setdefault("labels", []).append(value)
        elif name in fields:
            raise Problem(422, f"'{name[:NAME_LENGTH]}' is given twice")
        elif value != "":
            fields[name] = value
    return _asking(names, pictures, _valid(_Fields, fields), config)


def _valid(kind: type[Any], given: bytes | dict[str, Any]) -> Any:
    try:
        return kind.model_validate_json(given) if isinstance(given, bytes) else kind.model_validate(given)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        told = [f"{'.'.join(str(part)[:64] for part in fault['loc']) or 'body'}: {fault['msg']}" for fault in faults]
        raise Problem(422, "; ".join(told[:5]) + ("; ..." if len(told) > 5 else "")) from None
    except RecursionError:
        raise Problem(422, "the JSON is nested too deeply") from None


def _asking(names: list[str], pictures: list[bytes], asked: _Fields, config: ServeConfig) -> Asking:
    if not 1 <= len(pictures) <= config.pictures:
        raise Problem(422, f"{len(pictures)} pictures: send 1 to {config.pictures}")
    if asked.labels is not None:
        if len(asked.labels) > config.labels:
            raise Problem(422, f"{len(asked.labels)} labels: send 1 to {config.labels}")
        if any(len(label) > LABEL_LENGTH for label in asked.labels):
            raise Problem(422, f"a label is longer than {LABEL_LENGTH} characters")
    labels = None if asked.labels is None else tuple(asked.labels)
    question = Question(asked.task, labels, asked.k, asked.version, asked.top_k)
    return Asking(tuple(names), tuple(pictures), question)
