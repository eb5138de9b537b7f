#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3 on Python 3.11: the truncation that tokenizer.json stores is
# switched off by the first call of the tokenizer, and so is model_max_length.
#
# tokenizers documents enable_truncation and stores it in tokenizer.json; tokenizer_config.json has
# model_max_length. An informed guess is that a directory saved with both cuts long texts when it is
# loaded and called, so that pipeline("text-classification", model=DIR) takes a text of any length.
# Seen: the Rust tokenizer cuts at 4 tokens; after one call without arguments it gives all 9, from
# then on also when it is asked directly. Only truncation=True in each call cuts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = "one two three four five six seven eight nine".split()
vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", *words])}
rust = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
rust.pre_tokenizer = pre_tokenizers.Whitespace()
rust.enable_truncation(max_length=4)
PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]", pad_token="[PAD]",
                        model_max_length=4).save_pretrained("saved")
assert json.loads(Path("saved/tokenizer.json").read_text())["truncation"]["max_length"] == 4
assert json.loads(Path("saved/tokenizer_config.json").read_text())["model_max_length"] == 4

tokenizer = AutoTokenizer.from_pretrained("saved")
text = " ".join(words)
length = lambda: len(tokenizer.backend_tokenizer.encode(text).ids)
seen = [length(), len(tokenizer(text)["input_ids"]), length(),
        len(tokenizer(text, truncation=True)["input_ids"])]
print(seen)
assert seen == [4, 9, 9, 4]
PY
