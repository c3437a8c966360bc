"""What the stop-gradient through the ascent leaves out: the gradient of the LfU loss where θ_aux follows θ.

Eq. 2 moves the auxiliary component along a gradient that depends on θ. The paper, its released code and lfu take the
result as a constant. This is the gradient without that simplification, at the price of a second derivative of the SFT
loss: for study, never for training. h stays a constant, as Eq. 5 prints it. Read next: `test_second_order.py`.
"""

from collections.abc import Collection

from torch import Tensor
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfu.data.batches import Batch
from lfu.lora import Lora
from lfu.loss import answer_mask, consistency_loss, sft_loss
from lfu.model import Config, Params, Steering, forward
from lfu.train import Aux, ascend


def second_order_gradient(
    config: Config,
    base: Params,
    task: Lora,
    aux: Aux,
    batch: Batch,
    *,
    scale: float,
    alpha: float,
    lam: float,
    layers: Collection[int] | None = None,
    norm: str = "mean",
) -> Lora:
    """∇θ [sft(θ) + λ·consistency(θ, aux + α·g(θ)/‖g(θ)‖)] with g(θ) = ∇aux sft(θ, aux); arguments as `lfu_gradient`."""
    mask = answer_mask(batch.labels)

    def run(task: Lora, aux: Aux) -> tuple[Tensor, list[Tensor]]:
        if isinstance(aux, Tensor):
            return forward(config, base, batch.tokens, [(task, scale)], Steering(aux, mask))
        return forward(config, base, batch.tokens, [(task, scale), (aux, scale)])

    def sft(task: Lora, aux: Aux) -> Tensor:  # Eq. 1
        return sft_loss(run(task, aux)[0], batch.labels)

    def objective(task: Lora) -> Tensor:  # Eq. 6
        undesirable = ascend(aux, grad(sft, argnums=1)(task, aux), alpha)  # Eq. 2, a function of θ
        _, perturbed = run(task, undesirable)
        return sft(task, aux) + lam * consistency_loss(hidden, perturbed, mask, layers=layers, norm=norm)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        _, hidden = run(task, aux)  # h, a constant
        return grad(objective)(task)
