"""A published version as an MLflow model: pictures in, the answers of `predict --json` out.

MLflow copies this file into the model (models from code, so nothing is pickled) and runs it when the model is loaded.
The model's configuration says which version of which store answers. If the store has moved, give its new place:
`mlflow.pyfunc.load_model("models:/NAME@newest", model_config={"store": "/new/place"})`.
"""

from __future__ import annotations

from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from condu_ray.errors import DataError


class ConduModel(PythonModel):
    """Answers with one version of a store, which is loaded once."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the version that the configuration names (keys `store` and `version`); MLflow calls this."""
        from condu_ray.voting.open import load_classifier

        self._classifier = load_classifier(context.model_config["store"], context.model_config["version"])

    def predict(
        self, context: PythonModelContext, model_input: Any, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Returns one answer a picture.

        model_input: paths of pictures, as a list or as column "image" of a DataFrame. Raises DataError otherwise.
        """
        from condu_ray.voting.pictures import classify_paths

        return classify_paths(self._classifier, _paths(model_input))


def _paths(model_input: Any) -> list[str]:
    if hasattr(model_input, "columns"):
        if "image" not in model_input.columns:
            columns = ", ".join(map(str, model_input.columns))
            raise DataError(f"the table has no column 'image' (found {columns})", "name the column of paths 'image'")
        return [str(path) for path in model_input["image"]]
    if isinstance(model_input, str) or not hasattr(model_input, "__iter__"):
        raise DataError(f"cannot predict for {model_input!r}", "give a list of picture paths")
    return [str(path) for path in model_input]


mlflow.models.set_model(ConduModel())
