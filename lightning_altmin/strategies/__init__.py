"""Strategies of Lightning's Trainer for alternating minimization."""

from lightning_altmin.strategies.layer_parallel_strategy import LayerParallelStrategy

__all__ = ["LayerParallelStrategy"]
