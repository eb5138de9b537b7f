#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0 on Python 3.11: a directory named `datasets`
# in the working directory keeps the Trainer from training.
#
# The package `datasets` is optional, and the Trainer takes a plain list of rows. An informed guess
# is that a data directory of that name, as many repositories have, changes nothing: transformers
# asks whether a package is there, and for packages whose version it wants it tells a bare directory
# from an installed package. For `datasets` it asks for no version, so the directory counts.
# Seen: AttributeError: module 'datasets' has no attribute 'Dataset' at train(); without the
# directory the same script trains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 accelerate==1.15.0
cd "$folder"
cat > train.py <<'PY'
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
config = BertConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
rows = [{"input_ids": [2, 5, 3], "labels": i % 2} for i in range(8)]
arguments = TrainingArguments("out", num_train_epochs=1, use_cpu=True, report_to="none",
                              save_strategy="no", disable_tqdm=True)
try:
    Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows).train()
    print("trained")
except AttributeError as error:
    print(error)
PY
last_line() { HF_HUB_OFFLINE=1 PYTHONPATH=. "$folder/venv/bin/python" train.py | tail -n 1; }
without=$(last_line)
mkdir datasets
touch datasets/rows.csv
with=$(last_line)
printf '%s\n' "without: $without" "with: $with"
test "$without" = "trained"
test "$with" = "module 'datasets' has no attribute 'Dataset'"
