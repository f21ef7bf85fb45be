"""The MLflow model: each request brings a support set and samples to ask about. MLflow runs this file where it serves.

Legend: S support samples, Q query samples, N ways, D outputs of a regression.
"""

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from dmaml_pl.adapting.loading import load
from dmaml_pl.adapting.recipe import EVERYTHING


class FewShotModel(PythonModel):
    """Adapts to the support set of every request anew, so that it keeps nothing between requests."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights; whoever runs this file has trusted the code beside it."""
        self.learner = load(context.artifacts["checkpoint"], trust=[EVERYTHING])

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,  # of MLflow's types that ask for no check of its own; the signature makes it a dict
        params: dict[str, Any] | None = None,
    ) -> np.ndarray:
        """Probabilities (Q, N), their columns in the order of the class numbers, or values (Q, D).

        Args:
            context: MLflow's.
            model_input: "support_x" (S, ...), "support_y" (S,) or (S, D), and "query_x" (Q, ...).
            params: "steps" of adaptation; by the signature those of training, where a request names none.
        """
        steps = params["steps"] if params else None
        adapted = self.learner.adapt(model_input["support_x"], model_input["support_y"], steps)
        return adapted.predict(model_input["query_x"]).numpy()


set_model(FewShotModel())
