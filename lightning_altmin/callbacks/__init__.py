"""Callbacks: a schedule of mu, monitors of the algorithm, and comparisons with backpropagation."""

from lightning_altmin.callbacks.code_monitor import CodeMonitor
from lightning_altmin.callbacks.compare_to_backprop import CompareToBackprop
from lightning_altmin.callbacks.compare_with_twin import CompareWithTwin
from lightning_altmin.callbacks.mu_schedule import MuSchedule

__all__ = ["CodeMonitor", "CompareToBackprop", "CompareWithTwin", "MuSchedule"]
