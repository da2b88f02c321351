"""The card of an exported model says what its method is, what crossed, and how good the call is."""

from __future__ import annotations

from pathlib import Path

import finished_runs
import pytest
import yaml

from mpsl_dist.__main__ import main
from mpsl_dist.config.methods import METHODS

#: What a card says of a method, and what it does not.
SAYS = {
    "mpsl": ("(Multimodal Parallel Split Learning, arXiv 2502.06355)", "naive"),
    "psl": ("(naive parallel split learning: ", "(Multimodal"),
    "fedavg": ("(FedAvg, McMahan et al., 2017)", "2502.06355"),
    "fedclip": ("(FedCLIP, Lu et al., 2023)", "2502.06355"),
    "m2fedsa": ("(M²FedSA, Zhang, Qi and Xu, ICML 2024)", "2502.06355"),
    "standalone": ("what crossed: no tensor", "sent trained weights"),
    "mlecs": ("(ML-ECS, Liu et al.)", "Federated averaging"),
    "centralized": ("All training data lay in one process", "what crossed"),
}
#: Kinds of tensors that a card says have crossed.
CROSSED = {
    **dict.fromkeys(("mpsl", "psl"), "up activations, prediction_gradients; down predictions, "),
    **dict.fromkeys(("fedavg", "fedclip"), "up model_up; down model_down\n"),
    "m2fedsa": "up activations, prediction_gradients, sync_up; down predictions, ",
    "mlecs": "up lora_up; down fused_down, lora_down\n",
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Method -> the card of a model that it trained; all of one shape."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for method in METHODS:
        path = finished_runs.write(folder, finished_runs.experiment(method, method), model=True)
        assert main(["export", str(path), "--to", str(folder / "hub" / method)]) == 0
        found[method] = (folder / "hub" / method / "README.md").read_text("utf-8")
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_card_says_which_method_it_was_and_what_crossed(
    cards: dict[str, str], method: str
) -> None:
    card, (says, never) = cards[method], SAYS[method]
    assert f"- method: {method} (" in card and says in card and never not in card
    assert f"- what crossed: {CROSSED.get(method, '')}" in card or method == "centralized"


def test_a_card_leads_with_the_figure_of_the_call_that_it_shows(cards: dict[str, str]) -> None:
    for method, leads in (("m2fedsa", "accuracy_fused"), ("mlecs", "server_accuracy")):
        assert 'model.predict(image="a.png", audio="a.wav")' in cards[method]
        header = yaml.safe_load(cards[method].split("---")[1])
        (result,) = header["model-index"][0]["results"]
        assert result["metrics"][0]["name"] == leads
        table = cards[method].partition("|---|---|\n")[2]
        assert table.startswith(f"| test {leads} | 0.7")
    assert "others are of one modality alone" in cards["m2fedsa"]


def test_a_card_says_what_the_devices_of_ml_ecs_sent(cards: dict[str, str], tmp_path: Path) -> None:
    assert "sent their language models' trained LoRA factors: those tell" in cards["mlecs"]
    for said in ("They were sent a table of fused", "Public samples were everybody's, labels and"):
        assert said in cards["mlecs"]
    rules = {"exchange": "all", "aggregate": "samples", "transfer": False}
    chosen = finished_runs.experiment("mlecs", "x", mlecs=rules)
    path = finished_runs.write(tmp_path, chosen, model=True)
    assert main(["export", str(path), "--to", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub" / "README.md").read_text("utf-8")
    assert "which sent all that they had trained: those tell" in card
    assert "(ML-ECS, Liu et al.; here mlecs.exchange=all, mlecs.aggregate=samples, " in card
