# A registered classifier as MLflow loads it: the text columns of a table in, labels out.
#
# Needs MLflow and transformers, but not this package: MLflow keeps a copy of this file in the
# model's directory, with `text_cleaning.py` and the checkpoint.
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Classifier(PythonModel):
    """Cleans, joins and classifies texts as the service does."""

    def load_context(self, context: PythonModelContext) -> None:
        from text_cleaning import join_text  # pyrefly: ignore[missing-import]
        from transformers import pipeline
        self.join_text = join_text
        self.classify = pipeline("text-classification", context.artifacts["checkpoint"],
                                 truncation=True, batch_size=32)
        self.text_columns = context.model_config["text_columns"]
        self.fallback_label = context.model_config["fallback_label"]

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Label and probability; below `threshold` the label is the fallback label."""
        columns = model_input.reindex(columns=self.text_columns).fillna("").astype(str)
        texts = [self.join_text(*row) for row in columns.itertuples(index=False)]
        answers = pd.DataFrame(self.classify(texts), columns=["label", "score"])
        if self.fallback_label and params:  # MLflow fills in the signature's default
            answers.loc[answers["score"] < params["threshold"], "label"] = self.fallback_label
        return answers


set_model(Classifier())
