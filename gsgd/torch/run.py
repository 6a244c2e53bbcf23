"""What a rule of a torch function may ask of the run that is traced."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gsgd.network import BatchNormMode
from gsgd.torch.values import Kind
from gsgd.trace.nodes import Algebra, Nodes
from gsgd.trace.rules import Operand


class Run(Protocol):
    """A run of a model, in which every value has its nodes."""

    on: Algebra
    batch_norm: BatchNormMode
    current: str  # the function that is called, and the module

    def nodes(self, t: Tensor) -> Nodes:
        """The nodes of a value."""

    def described(self, t: Any) -> str | None:
        """The name under which a parameter can be described: nothing else may read it."""

    def weight(self, t: Any) -> str:
        """The same of a parameter that must have one."""

    def kind(self, t: Tensor) -> Kind:
        """Whether its values are the same in every pass."""

    def why_not_described(self, t: Any) -> str:
        """Why a parameter, or a view of one, can't be described; nothing for others and for those that can."""

    def operand(self, value: Any) -> Operand:
        """A tensor or a number."""

    def moved(self, t: Tensor, views: list[Tensor]) -> None:
        """If `t` is a parameter, so are its views."""
