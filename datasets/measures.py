"""Prints quality measures of the embedded tables; exit code 1 if a limit is exceeded.

python datasets/measures.py [--train-run RUN_ID --external TABLE]
"""
import argparse
import re
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from madewithml.data import build_texts, read_labeled_table, read_table
from madewithml.evaluate import baseline_f1
from madewithml.metrics import classification_metrics

FOLDER = Path(__file__).parent
MAX_JACCARD = 0.8  # of the token sets of two texts
MAX_COSINE = 0.45  # of the TF-IDF vectors of two texts
MAX_BASELINE = 0.90  # F1 of TF-IDF + logistic regression on the holdout
MIN_EXTERNAL = 0.85  # F1 of a model trained here on an external table


def near_duplicates(
    texts: list[str], limit: float = MAX_JACCARD,
) -> list[tuple[float, int, int]]:
    """Pairs of texts whose token sets have a Jaccard similarity over the limit."""
    tokens = [frozenset(re.findall(r"\w+", text.casefold())) for text in texts]
    pairs = []
    for i, j in combinations(range(len(tokens)), 2):
        a, b = tokens[i], tokens[j]
        # a similarity over the limit requires similar sizes
        if min(len(a), len(b)) > limit * max(len(a), len(b)) and len(a & b) > limit * len(a | b):
            pairs.append((len(a & b) / len(a | b), i, j))
    return pairs


def paraphrases(texts: list[str], limit: float = MAX_COSINE) -> list[tuple[float, int, int]]:
    """Pairs of texts with a TF-IDF cosine over the limit: one project in other sentences."""
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    similarities = (vectors @ vectors.T).tocoo()
    pairs = zip(similarities.data, similarities.row, similarities.col, strict=True)
    return [(value, i, j) for value, i, j in pairs if i < j and value > limit]


def external_f1(run_id: str, loc: str) -> float:
    """Weighted F1 of a trained run on an external table."""
    from madewithml.models import class_names, load_classifier, predict_proba
    from madewithml.tracking import fetch_checkpoint
    model, tokenizer = load_classifier(fetch_checkpoint(run_id))
    rows = read_labeled_table(loc)
    names = class_names(model)
    predicted = predict_proba(model, tokenizer, build_texts(rows)).argmax(1)
    return classification_metrics(rows["tag"].to_numpy(), [names[i] for i in predicted]).f1


def summarize(train: pd.DataFrame, holdout: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Prints the rows of each label and the lengths of the texts."""
    print(pd.DataFrame({"dataset.csv": train["tag"].value_counts(),
                        "holdout.csv": holdout["tag"].value_counts()}).to_string())
    words = (rows["title"] + " " + rows["description"]).str.split().str.len()
    unlabeled = len(rows) - len(train) - len(holdout)
    print(f"rows: {len(train)} + {len(holdout)} + {unlabeled} unlabeled; "
          f"words: {words.min()} to {words.max()}, median {words.median():.0f}")


def measure(options: argparse.Namespace) -> Iterator[tuple[str, float, str, bool]]:
    """Name, value, limit and success of each measure."""
    train = read_labeled_table(FOLDER / "dataset.csv")
    holdout = read_labeled_table(FOLDER / "holdout.csv")
    unlabeled = read_table(FOLDER / "unlabeled.csv")
    rows = pd.concat([train, holdout, unlabeled], ignore_index=True)
    summarize(train, holdout, rows)
    texts = build_texts(rows)
    pairs = len(near_duplicates(texts))
    yield f"near duplicates (token Jaccard over {MAX_JACCARD})", pairs, "none", pairs == 0
    pairs = len(paraphrases(texts))
    yield f"paraphrases (TF-IDF cosine over {MAX_COSINE})", pairs, "none", pairs == 0
    f1 = baseline_f1(train, holdout)
    yield ("TF-IDF + logistic regression, F1 on the holdout", round(f1, 3),
           f"under {MAX_BASELINE}", f1 < MAX_BASELINE)
    if options.train_run and options.external:
        f1 = external_f1(options.train_run, options.external)
        yield ("trained here, F1 on the external table", round(f1, 3),
               f"at least {MIN_EXTERNAL}", f1 >= MIN_EXTERNAL)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-run", help="MLflow run trained on dataset.csv alone")
    parser.add_argument("--external", help="labeled table from another source")
    success = True
    for name, value, limit, is_met in measure(parser.parse_args()):
        print(f"{'ok    ' if is_met else 'MISSED'} {name}: {value} ({limit})")
        success = success and is_met
    return 0 if success else 1


if __name__ == "__main__":
    sys.exit(main())
