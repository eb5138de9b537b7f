"""Registers a version of `madewithml` made from version 1: as good, wrong, or slow."""
import sys
import tempfile

import torch

from madewithml.models import load_classifier, save_classifier
from madewithml.registry import register_model
from madewithml.tracking import CHECKPOINT, fetch_checkpoint, get_run, mlflow_client


def swap_labels(model: torch.nn.Module) -> None:
    """The first two labels change their names, in the outputs too."""
    layer = model.classifier
    order = [1, 0, *range(2, layer.out_features)]
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order].clone())
        layer.bias.copy_(layer.bias[order].clone())


def widen(model: torch.nn.Module) -> None:
    """Ten times as many units between the two layers of each feed-forward part; the outputs stay,
    since what is added has no weight."""
    old = model.config.intermediate_size
    new = model.config.intermediate_size = 10 * old
    for layer in model.base_model.encoder.layer:
        for part, name, shape in ((layer.intermediate, "out", (new, model.config.hidden_size)),
                                  (layer.output, "in", (model.config.hidden_size, new))):
            wide = torch.nn.Linear(shape[1], shape[0])
            with torch.no_grad():
                wide.weight.zero_()
                wide.bias.zero_()
                if name == "out":
                    wide.weight[:old].copy_(part.dense.weight)
                    wide.bias[:old].copy_(part.dense.bias)
                else:
                    wide.weight[:, :old].copy_(part.dense.weight)
                    wide.bias.copy_(part.dense.bias)
            part.dense = wide


def release(kind: str) -> None:
    """Registers a new version of this kind as the challenger."""
    client = mlflow_client()
    original = client.get_model_version("madewithml", "1").run_id
    model, tokenizer = load_classifier(fetch_checkpoint(original), torch.device("cpu"))
    {"wrong": swap_labels, "slow": widen}.get(kind, lambda model: None)(model)
    run = client.create_run(get_run(original).info.experiment_id).info.run_id
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_classifier(model, tokenizer, f"{folder}/model", 128)
        client.log_artifacts(run, str(checkpoint), CHECKPOINT)
    print(register_model(run).version)


if __name__ == "__main__":
    release(sys.argv[1])
