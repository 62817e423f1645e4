"""Decides how weights kept in 16 bits are stepped: on 32-bit masters, matrices by Muon and the rest by AdamW.

On two cores a model of a few million parameters is limited by samples, not by steps; Muon needs fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pipeline.machine import emulates_bfloat16

SMALLEST = 60  # a matrix with a shorter side, an embedding and every vector are AdamW's


def kept_in() -> torch.dtype:
    """The type that weights have while they learn: 16 bits, where this machine multiplies them."""
    return torch.float32 if emulates_bfloat16() and not torch.cuda.is_available() else torch.bfloat16


class MixedPrecisionMuon(torch.optim.Optimizer):  # type: ignore[misc]
    """AdamW and Muon in one, so that one schedule and one file of state serve both."""

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 0.01, muon: float = 16.0) -> None:
        """`muon` is its learning rate over AdamW's `lr`; 0 leaves every weight to AdamW."""
        whole = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if muon else set()
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in model.parameters() if _is_matrix(p, whole - tables)]
        taken = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        groups: list[dict[str, Any]] = [{"params": others, "lr": lr, "kind": "adamw"}]
        if matrices:
            groups.append({"params": matrices, "lr": lr * muon, "kind": "muon"})
        super().__init__(groups, {"weight_decay": weight_decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            move = _muon if group["kind"] == "muon" else _adamw
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["master"] = p.detach().float().clone()
                    master = state["master"]
                    master.mul_(1 - group["lr"] * group["weight_decay"])
                    move(state, master, p.grad.float(), group["lr"])
                    p.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved: the base class would cut the masters down to the weights' 16 bits."""
        super().load_state_dict(state_dict)
        weights = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(weights):
            if number in state_dict["state"]:
                self.state[p] = {name: _copied(value) for name, value in state_dict["state"][number].items()}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_matrix(p: nn.Parameter, linear: Iterable[int]) -> bool:
    return p.requires_grad and id(p) in linear and min(p.shape) >= SMALLEST


def _adamw(state: dict[str, Any], master: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
    beta1, beta2 = 0.9, 0.98
    if "first" not in state:
        state["first"], state["second"], state["count"] = torch.zeros_like(master), torch.zeros_like(master), 0
    state["count"] += 1
    first, second = state["first"].lerp_(grad, 1 - beta1), state["second"].lerp_(grad.square(), 1 - beta2)
    scale = (second / (1 - beta2 ** state["count"])).sqrt_().add_(1e-8)
    master.addcdiv_(first, scale, value=-lr / (1 - beta1 ** state["count"]))


def _muon(state: dict[str, Any], master: torch.Tensor, grad: torch.Tensor, lr: float) -> None:
    momentum = state.setdefault("momentum", torch.zeros_like(master))
    momentum.lerp_(grad, 0.05)
    direction = orthogonal(grad.lerp(momentum, 0.95))
    master.add_(direction, alpha=-lr * max(1.0, master.shape[0] / master.shape[1]) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values pushed towards one, by five Newton-Schulz steps."""
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).to(kept_in())
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.T).float()
