"""A published version as an MLflow model: pictures in, the answers of `predict --json` out.

MLflow copies this file into the model (models from code, so nothing is pickled) and runs it when the model is loaded.
The model's configuration says which version of which store answers. If the store has moved, give its new place:
`mlflow.pyfunc.load_model("models:/NAME@newest", model_config={"store": "/new/place"})`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class ConduModel(PythonModel):  # type: ignore[misc]  # MLflow is not followed
    """Answers with one version of a store, which is loaded once."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the version that the configuration names (keys `store` and `version`); MLflow calls this."""
        from condu_ray.voting.open import load_classifier

        self._classifier = load_classifier(context.model_config["store"], context.model_config["version"])

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """Returns one answer a picture.

        model_input: paths of pictures. MLflow reads from the type that a table with the single column "image" may be
        given as well. Raises DataError for a file that is no picture.
        """
        from condu_ray.voting.pictures import classify_paths

        return classify_paths(self._classifier, model_input)


mlflow.models.set_model(ConduModel())
