"""LeNet-5 in its usual modern form."""

from torch import nn

from lightning_altmin.arguments import check_count
from lightning_altmin.nn.arguments import check_image_size
from lightning_altmin.nn.sequence import LayerSequence


class LeNet5(LayerSequence):
    """LeNet-5 with ReLU and max pooling: two 5 x 5 convolutions (6 and 16 channels, no padding), then 120-84-classes.

    Takes images of shape ``(batch, in_channels, image_size, image_size)`` and returns logits
    ``(batch, num_classes)``. At 28 x 28 the first fully connected layer sees 256 features, at 32 x 32 it sees 400.

    Args:
        in_channels: Channels of the images; at least 1.
        num_classes: Width of the output; at least 1.
        image_size: Height and width of the images in pixels; at least 16.

    Raises:
        ValueError: If an argument is not an integer, or too small.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        check_count("in_channels", in_channels)
        check_count("num_classes", num_classes)
        check_image_size(image_size, smallest=16, why="two unpadded 5 x 5 convolutions, each halved by a pooling")
        side = ((image_size - 4) // 2 - 4) // 2
        super().__init__(
            nn.Conv2d(in_channels, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )
