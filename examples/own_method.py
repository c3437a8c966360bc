"""A regulariser of your own under the same loop, checkpoints and scores as the built-in ones.

    python examples/own_method.py OUT

This one asks the adapter to move the states of the answer little: λ times the mean squared distance between the states
with and without it. A method is a function (config, base, task, batch, generator, *, hyper-parameters) -> (gradient,
metrics) and a line in METHODS; its hyper-parameters are those that `lfu train` has.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfu import METHODS, Batch, Config, Params, cli, consistency_loss
from lfu.baselines.regularisers import loss_gradient
from lfu.lora import Lora
from lfu.loss import answer_mask
from lfu.methods import Spec
from lfu.model import embed, trunk
from lfu.train import Metrics


def stay_close(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *, lam: float, **options: Any
) -> tuple[Lora, Metrics]:
    """The gradient of the SFT loss and λ times the squared distance from the base model's states."""
    with torch.no_grad():
        before = trunk(config, base, embed(base, batch.tokens))

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        distance = consistency_loss(before, hidden, answer_mask(batch.labels))
        return sft + lam * distance, {"distance": distance}

    return loss_gradient(config, base, task, batch, loss, **options)


METHODS["stay-close"] = Spec(stay_close, {"lam": 1.0})

if __name__ == "__main__":
    mini, out = Path(__file__).parents[1] / "weights" / "mini", Path(sys.argv[1])
    adapter = cli.train(
        cli.TrainOptions(
            model=str(mini),
            data=str(mini / "math" / "train.jsonl"),
            out=str(out),
            method="stay-close",
            lam=10.0,
            template="question",
            learning_rate=0.01,
            epochs=2,
        )
    )
    cli.evaluate(cli.EvalOptions(model=str(mini), adapter=str(adapter), data=str(mini / "math" / "test.jsonl")))
