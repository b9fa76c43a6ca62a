"""Several processes, without Lightning: a batch shared among them, or the layers dealt out."""

from lightning_altmin.parallel.data_parallel import DataParallel
from lightning_altmin.parallel.dealing import stage_costs
from lightning_altmin.parallel.layer_parallel import LayerParallel
from lightning_altmin.processes import ProcessLostError

__all__ = ["DataParallel", "LayerParallel", "ProcessLostError", "stage_costs"]
