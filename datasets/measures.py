"""Prints the measures of the embedded data set, and ends with exit code 1 where one is missed.

python datasets/measures.py [--train-run RUN_ID --foreign TABLE]
"""
import argparse
import re
import sys
from itertools import combinations
from pathlib import Path

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from madewithml.data import read_labeled_table, read_table, build_texts
from madewithml.evaluate import baseline_f1, classification_metrics

FOLDER = Path(__file__).parent
MAX_JACCARD, MAX_COSINE, MAX_BASELINE, MIN_FOREIGN = 0.8, 0.45, 0.90, 0.85


def near_duplicates(texts: list[str], limit: float = MAX_JACCARD) -> list[tuple[float, int, int]]:
    """Pairs of texts whose sets of tokens have a Jaccard similarity over the limit."""
    tokens = [frozenset(re.findall(r"\w+", text.casefold())) for text in texts]
    found = []
    for i, j in combinations(range(len(tokens)), 2):
        a, b = tokens[i], tokens[j]
        # a similarity over the limit needs sizes that are close
        if min(len(a), len(b)) > limit * max(len(a), len(b)) and len(a & b) > limit * len(a | b):
            found.append((len(a & b) / len(a | b), i, j))
    return found


def retellings(texts: list[str], limit: float = MAX_COSINE) -> list[tuple[float, int, int]]:
    """Pairs of texts that share their rare words (TF-IDF cosine over the limit): the same project told twice in other sentences."""
    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    similar = (vectors @ vectors.T).tocoo()
    return [(value, i, j) for value, i, j in zip(similar.data, similar.row, similar.col, strict=True) if i < j and value > limit]


def foreign_f1(run_id: str, loc: str) -> float:
    """Weighted F1 of a trained run on a table from elsewhere."""
    from madewithml.models import class_names, load_classifier, predict_proba
    from madewithml.tracking import fetch_checkpoint
    model, tokenizer = load_classifier(fetch_checkpoint(run_id))
    rows = read_labeled_table(loc)
    names, predicted = class_names(model), predict_proba(model, tokenizer, build_texts(rows)).argmax(1)
    return classification_metrics(rows["tag"].to_numpy(), [names[i] for i in predicted]).f1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-run", help="MLflow run trained on dataset.csv alone")
    parser.add_argument("--foreign", help="labeled table from elsewhere")
    options = parser.parse_args()
    train, holdout, unlabeled = read_labeled_table(FOLDER / "dataset.csv"), read_labeled_table(FOLDER / "holdout.csv"), read_table(FOLDER / "unlabeled.csv")
    everything = pd.concat([train, holdout, unlabeled], ignore_index=True)
    words = everything.apply(lambda row: len(f"{row['title']} {row['description']}".split()), axis=1)
    print(pd.DataFrame({"dataset.csv": train["tag"].value_counts(), "holdout.csv": holdout["tag"].value_counts()}).to_string())
    print(f"rows: {len(train)} + {len(holdout)} + {len(unlabeled)} unlabeled; words: {words.min()} to {words.max()}, median {words.median():.0f}")
    texts, baseline = build_texts(everything), baseline_f1(train, holdout)
    pairs, told_twice = near_duplicates(texts), retellings(texts)
    results = [(f"near duplicates (token Jaccard over {MAX_JACCARD})", len(pairs), "none", not pairs),
               (f"told twice (TF-IDF cosine over {MAX_COSINE})", len(told_twice), "none", not told_twice),
               ("TF-IDF + logistic regression, F1 on the holdout", round(baseline, 3), f"under {MAX_BASELINE}", baseline < MAX_BASELINE)]
    if options.train_run and options.foreign:
        foreign = foreign_f1(options.train_run, options.foreign)
        results.append(("trained here, F1 on the foreign table", round(foreign, 3), f"at least {MIN_FOREIGN}", foreign >= MIN_FOREIGN))
    for name, value, wanted, good in results:
        print(f"{'ok    ' if good else 'MISSED'} {name}: {value} ({wanted})")
    return 0 if all(good for *_, good in results) else 1


if __name__ == "__main__":
    sys.exit(main())
