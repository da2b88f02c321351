"""The parts of the model, its tasks and its initial weights. Knows no client and no process."""
