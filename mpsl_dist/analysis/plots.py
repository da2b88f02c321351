"""Pictures of a run."""

from __future__ import annotations

import numpy as np

from mpsl_dist.records.run_directory import RunDirectory


def learning_curve(run: RunDirectory) -> None:
    """Draw training loss and test metrics over the steps into the run's ``learning_curve.png``.

    A run without a step leaves none.
    """
    from matplotlib.figure import Figure

    lines = run.metrics()
    train = [line for line in lines if line["split"] == "train"]
    test = [line for line in lines if line["split"] == "test"]
    if not train:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    left.plot(steps, losses, color="0.8", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 50)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        left.plot(steps[window - 1 :], smooth, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel="global training loss")
    left.legend(frameon=False)
    for name in test[-1]["metric"] if test else ():
        values = [line["metric"][name] for line in test]
        right.plot([line["step"] for line in test], values, marker=".", label=name)
    right.set(xlabel="step", ylabel="test metric", ylim=(0, 1))
    right.grid(axis="y", color="0.9")
    if test:
        right.legend(frameon=False, loc="lower right")
    figure.suptitle(run.path.name)
    figure.savefig(run.path / "learning_curve.png", dpi=120)
