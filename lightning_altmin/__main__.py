"""``python -m lightning_altmin`` is ``lightning-altmin``."""

from lightning_altmin.cli import main

if __name__ == "__main__":
    main()
