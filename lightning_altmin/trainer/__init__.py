"""What a run in the Lightning Trainer needs beside the module: refusals, checkpoints, exact resume, its position."""
