"""Tokenizer sync: summed gradients every step are centralized training; weights are FedAvg's."""

from __future__ import annotations

import pytest
import torch
from test_exactness import assert_close, run_gold

from mpsl_dist.actors import deployable
from mpsl_dist.actors.holdings import Holdings, load_data
from mpsl_dist.actors.learner import Learner
from mpsl_dist.methods.centralized import Centralized

STEPS = 20
CLIENTS = (1, 4, 10)


def case(clients: int, mode: str, every: int, masked: bool = False) -> dict:
    partition = {"alpha": 0.1, "minimum": 1}
    if masked:  # a sum is of three clients or more
        partition = {"kind": "iid"}
    return {
        "clients": clients,
        "clients_per_worker": 3,
        "tokenizer_sync": {"mode": mode, "every": every, "masked": masked},
        "faults": {"min_clients": min(3, clients)},
        "data": {"name": "toy-image+text", "partition": partition},
        "training": {
            "precision": "float64",
            "epochs": 10,
            "batch_size": 20,
            "server": {"lr": 1e-2, "weight_decay": 0.1},
            "client": {"lr": 1e-2, "weight_decay": 0.1},
        },
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    chosen = {f"gradients {n}": case(n, "gradients", 1) for n in CLIENTS}
    chosen |= {"gradients 4 every 5": case(4, "gradients", 5)}
    chosen |= {"gradients masked": case(4, "gradients", 1, masked=True)}
    chosen |= {"weights 4": case(4, "weights", 1), "none 4": case(4, "none", 1)}
    return run_gold(tmp_path_factory.mktemp("sync"), chosen, STEPS)


@pytest.mark.parametrize("which", [*CLIENTS, "masked"])
def test_summed_gradients_every_step_equal_centralized_training(which, trained) -> None:
    experiment, told = trained[f"gradients {which}"]
    torch.set_num_threads(1)
    holdings = Holdings.load(experiment)
    learner = Learner(deployable.build(experiment, holdings.splits), experiment.training)
    central = Centralized(experiment, holdings, learner)
    for step in range(STEPS):
        epoch, epoch_step = divmod(step, len(central.plan))
        if epoch_step == 0:
            central.begin_epoch(epoch)
        assert told["losses"][step] == pytest.approx(central.step(epoch_step, step), rel=1e-8)
    for name, value in learner.model.server_model.state_dict().items():
        assert_close(told["server"][name], value, 1e-8, f"server {name}")
    own = dict(learner.model.tokenizers.named_parameters())
    for client, state in told["clients"].items():
        for name, value in state.items():
            assert_close(value, own[name].detach(), 1e-8, f"client {client} {name}")


@pytest.mark.parametrize(
    "mode", ["gradients 4", "gradients 4 every 5", "gradients masked", "weights 4"]
)
def test_synced_tokenizers_are_identical_and_moved(mode: str, trained) -> None:
    experiment, told = trained[mode]
    first = dict(deployable.build(experiment, load_data(experiment)).tokenizers.named_parameters())
    one, *others = told["clients"].values()
    for name, value in one.items():
        assert not torch.equal(value, first[name])
        assert all(torch.equal(value, other[name]) for other in others), name


def test_without_sync_tokenizers_drift_apart(trained) -> None:
    one, other, *_ = trained["none 4"][1]["clients"].values()
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_what_the_toys_train_is_what_the_sync_moves(trained) -> None:
    _, told = trained["gradients 4"]
    assert set(told["clients"][0]) == {
        "by_modality.image.cls",
        "by_modality.image.positions",
        "by_modality.image.patchify.weight",
        "by_modality.text.positions",
        "pre_norm.weight",
        "pre_norm.bias",
    }
