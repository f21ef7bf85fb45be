"""How a meta-batch is executed."""

from dmaml_pl.engines.learn2learn import Learn2LearnEngine

__all__ = ["Learn2LearnEngine"]
