"""The base of the networks here: an ``nn.Sequential`` built from its own arguments."""

from typing import overload

from torch import nn


class LayerSequence(nn.Sequential):
    """An ``nn.Sequential`` whose constructor may take something else than modules.

    Subclasses pass their layers on as positional arguments, so that the ``state_dict`` keys are the plain indices.
    Everything else is inherited, with one repair: a slice is an ordinary ``nn.Sequential`` over the same modules and
    under the same keys. (The inherited slice calls the subclass's constructor with modules, which it cannot take.)
    """

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return the layer at ``index``, or an ``nn.Sequential`` of the layers of a slice."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = nn.Sequential()
        for name, module in list(self._modules.items())[index]:
            part.add_module(name, module)
        return part
