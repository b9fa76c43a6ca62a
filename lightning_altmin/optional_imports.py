"""Import of the packages that only some data modules, callbacks, plots and run logs need."""

import importlib
from typing import Any


def import_extra(module: str) -> Any:
    """Import a module of the ``examples`` extra.

    Args:
        module: full name of the module, such as ``"sklearn.datasets"``.

    Returns:
        The imported module.

    Raises:
        ImportError: if the package is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); install it with: pip install 'lightning_altmin[examples]'"
        ) from error
