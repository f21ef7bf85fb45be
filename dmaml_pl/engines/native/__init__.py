"""Meta-gradients without autograd, by C++ that is compiled where it runs."""

from dmaml_pl.engines.native.engine import NativeEngine

__all__ = ["NativeEngine"]
