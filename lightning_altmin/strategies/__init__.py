"""Several processes: how each strategy of Lightning shares a batch."""

from lightning_altmin.strategies.data_parallel import DataParallel
from lightning_altmin.strategies.layer_parallel import LayerParallel
from lightning_altmin.strategies.lost import ProcessLostError
from lightning_altmin.strategies.sigterm import end_together_on_sigterm
from lightning_altmin.strategies.trainer import processes_of, refuse_strategy

__all__ = [
    "DataParallel",
    "LayerParallel",
    "ProcessLostError",
    "end_together_on_sigterm",
    "processes_of",
    "refuse_strategy",
]
