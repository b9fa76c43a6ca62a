"""Several processes: how each strategy of Lightning shares the work on a batch."""

from lightning_altmin.processes import ProcessLostError
from lightning_altmin.strategies.data_parallel import DataParallel
from lightning_altmin.strategies.dealing import stage_costs
from lightning_altmin.strategies.layer_parallel import LayerParallel
from lightning_altmin.strategies.layer_parallel_strategy import LayerParallelStrategy
from lightning_altmin.strategies.layer_sync import keep_modules, synchronises_batch_norm
from lightning_altmin.strategies.sigterm import end_together_on_sigterm
from lightning_altmin.strategies.trainer import processes_of, refuse_strategy

__all__ = [
    "DataParallel",
    "LayerParallel",
    "LayerParallelStrategy",
    "ProcessLostError",
    "end_together_on_sigterm",
    "keep_modules",
    "processes_of",
    "refuse_strategy",
    "stage_costs",
    "synchronises_batch_norm",
]
