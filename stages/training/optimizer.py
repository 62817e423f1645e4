"""An optimizer for weights in 16 bits: it updates 32-bit copies, matrices by Muon and the rest by AdamW.

A model of a few million parameters on two cores is limited by examples, not by steps, and Muon needs fewer examples.
torch.optim.Muon always orthogonalises in bfloat16: where a CPU emulates it, a step takes 5.2 s instead of 0.3 s
(`ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.optimizer`). It has no 32-bit copies either.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from pipeline.machine import emulates_bfloat16

MIN_SIDE = 60  # matrices with a shorter side, embeddings and vectors are updated by AdamW


def choose_dtype() -> torch.dtype:
    """The type of weights during training: 16 bits, unless this machine only emulates 16-bit products."""
    return torch.float32 if emulates_bfloat16() and not torch.cuda.is_available() else torch.bfloat16


class MixedPrecisionMuon(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW and Muon in one optimizer, so that one schedule and one state file serve both."""

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 0.01, muon: float = 16.0) -> None:
        """
        Args:
            lr: AdamW's learning rate.
            muon: Muon's learning rate over `lr`; 0 updates every weight by AdamW.
        """
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if muon else set()
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in model.parameters() if _is_matrix(p, linear - embeddings)]
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in matrix_ids]
        groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "kind": "adamw"}]
        if matrices:
            groups.append({"params": matrices, "lr": lr * muon, "kind": "muon"})
        super().__init__(groups, {"weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            update = _update_by_muon if group["kind"] == "muon" else _update_by_adamw
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["master"] = p.detach().float().clone()
                    master = state["master"]
                    master.mul_(1 - group["lr"] * group["weight_decay"])
                    update(state, master, p.grad.float(), group["lr"])
                    p.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state in its own precision; the base class would cast it to the weights' 16 bits."""
        super().load_state_dict(state_dict)
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(weights):
            if number in state_dict["state"]:
                self.state[p] = {name: _copy(value) for name, value in state_dict["state"][number].items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_matrix(p: nn.Parameter, linear: Collection[int]) -> bool:
    return p.requires_grad and id(p) in linear and min(p.shape) >= MIN_SIDE


def _update_by_adamw(state: dict[str, Any], master: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
    beta1, beta2 = 0.9, 0.98
    if "first" not in state:
        state["first"], state["second"], state["count"] = torch.zeros_like(master), torch.zeros_like(master), 0
    state["count"] += 1
    first, second = state["first"].lerp_(grad, 1 - beta1), state["second"].lerp_(grad.square(), 1 - beta2)
    scale = (second / (1 - beta2 ** state["count"])).sqrt_().add_(1e-8)
    master.addcdiv_(first, scale, value=-lr / (1 - beta1 ** state["count"]))


def _update_by_muon(state: dict[str, Any], master: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
    """Keller Jordan's Muon, with Nesterov momentum."""
    momentum = state.setdefault("momentum", torch.zeros_like(master))
    momentum.lerp_(grad, 0.05)
    direction = orthogonalise(grad.lerp(momentum, 0.95))
    master.add_(direction, alpha=-lr * max(1.0, master.shape[0] / master.shape[1]) ** 0.5)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values pushed towards one, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).to(choose_dtype())
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.T).float()
