"""The gold test: distributed MPSL equals a plain single process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import reference
import torch
import toys
from conftest import launcher, torchrun_line
from local_fleet import in_one_process, users_in_one_process

from mpsl_dist.actors import assembly
from mpsl_dist.actors.holdings import load_data
from mpsl_dist.config import Experiment, to_dict

STEPS = 5
RANKS = Path(__file__).with_name("ranks.py")
#: Relative to the largest entry of each tensor.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def cases(device: str = "cpu") -> dict[str, dict]:
    """Every fusion and modality pair in both precisions, and 1 to 4 clients, two on one worker."""
    pairs = ("image+text", "image+audio", "audio+text")
    found = {}
    for fusion, pair, precision in itertools.product(("early", "late"), pairs, TOLERANCE):
        found[f"{fusion} {pair} {precision}"] = {"clients": 4} | _case(fusion, pair, precision)
    for clients in (1, 2, 3):
        found[f"{clients} clients"] = {"clients": clients} | _case("early", "image+text", "float64")
    found["4 clients on 2 workers"] = found["early image+text float64"] | {"clients_per_worker": 2}
    found["equal shares, dry clients"] = found["late image+audio float64"] | {
        "client_share": "equal"
    }
    # The client's model ends and begins the step; one case each of fusion, sync and retrieval.
    found["heads at clients"] = _heads(found["early image+text float64"], "none")
    found["heads at clients, late"] = _heads(found["late image+audio float64"], "weights")
    found["heads at clients, retrieval"] = _heads(_retrieval("client", "float64"), "gradients")
    for contrastive in ("client", "global"):
        # In float64 alone: the reference writes the loss as another sum, and AdamW makes steps of
        # full size from float32's rounding in parameters without a gradient (a key's bias).
        found[f"retrieval {contrastive}"] = _retrieval(contrastive, "float64")
    found |= _with_gaps()
    return {name: case | {"device": device} for name, case in found.items()}


def _with_gaps() -> dict[str, dict]:
    """Clients that lack a modality, samples that lack parts, and a manifest's own gaps."""
    by_client = _case("early", "image+audio", "float64")
    by_client["data"] |= {"missing": {"rate": 0.5, "seed": 3}}
    late = _case("late", "image+audio", "float64")
    late["data"] |= {"missing": {"rate": 0.5, "seed": 3, "per": "sample"}}
    synced = {"clients_per_worker": 2, "tokenizer_sync": {"mode": "gradients", "every": 1}}
    found = {
        "gaps by client": by_client,
        "gaps by sample, synced": late | synced,
        "gaps of the data": _case("early", "gaps", "float64") | {"clients": 3},
    }
    return {name: {"clients": 4} | case for name, case in found.items()}


def _heads(case: dict, mode: str) -> dict:
    """Every client with a head of its own, synced with its tokenizers; two on a worker."""
    model = case["model"] | {"head_at": "client"}
    sync = {"mode": mode, "every": 1}
    return case | {"model": model, "tokenizer_sync": sync, "clients_per_worker": 2}


def coded_cases() -> dict[str, dict]:
    """What the plain reference knows nothing of: coded or noisy on its way, or M²FedSA's users."""
    wires = {
        "coded early": {"activations": "int4", "gradients": "int8"},
        "coded late": {"activations": "fp8", "gradients": "int4", "rounding": "nearest"},
        "coded gradients alone": {"gradients": "bf16"},
    }
    late = {"data": {"name": "toy-image+audio"}, "model": {"fusion": "late"}}
    coded = {
        name: {"wire": wire, "clients_per_worker": 2} | (late if "late" in name else {})
        for name, wire in wires.items()
    }
    gaps = _with_gaps()["gaps by client"]
    coded["coded gaps"] = gaps | {"wire": wires["coded early"], "clients_per_worker": 2}
    defences = {"nopeek": 0.5, "gradient_noise": 0.5, "label_epsilon": 2, "token_noise": 0.2}
    defences |= {"shuffle_patches": True, "secret": "seed"}
    # Two steps after the switch, which ends the first epoch's three.
    users = {"method": "m2fedsa", "data": late["data"], "clients_per_worker": 2}
    users |= {"m2fedsa": {"switch": {"rule": "round", "round": 1}}, "training": {"batch_size": 40}}
    coded |= {"unimodal clients": users}
    return coded | {"defended": late | {"clients_per_worker": 2, "defences": defences}}


def _retrieval(contrastive: str, precision: str) -> dict:
    case = {"clients": 3, "contrastive": contrastive} | _case("late", "pairs", precision)
    return case | {"model": {"normalize": True, "temperature": 0.2}}


def _case(fusion: str, pair: str, precision: str) -> dict:
    training = {"precision": precision}
    base = toys.experiment()
    return {
        "data": {"name": f"toy-{pair}"},
        "model": {"fusion": fusion, "pooling": "mean" if fusion == "early" else "cls"},
        "training": to_dict(base)["training"] | training,
    }


def run_gold(folder: Path, chosen: dict[str, dict], steps: int = STEPS) -> dict[str, tuple]:
    """Run all cases in one world; give (experiment, what came of it) by case."""
    experiments = {name: toys.experiment(**case) for name, case in chosen.items()}
    task = folder / "task.json"
    listed = [to_dict(e) | {"output": str(folder)} for e in experiments.values()]
    task.write_text(json.dumps({"steps": steps, "experiments": listed}))
    with launcher(folder) as launch:
        line = torchrun_line(5, str(RANKS), "gold", str(task))
        status, output = launch(line).finish(240)
    assert status == 0, output
    told = torch.load(task.with_suffix(".pt"))
    return {name: (experiments[name], told[i]) for i, name in enumerate(experiments)}


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """All cases, trained once for the whole module."""
    return run_gold(tmp_path_factory.mktemp("gold"), cases() | coded_cases())


def assert_equals_reference(experiment: Experiment, told: dict) -> None:
    """Losses, cut-layer gradients and every parameter, each within its precision's tolerance."""
    tolerance = TOLERANCE[experiment.training.precision]
    expected = reference.train(experiment, STEPS)
    for step in range(STEPS):
        assert told["losses"][step] == pytest.approx(expected["losses"][step], rel=tolerance)
        ours, theirs = told["cut_gradients"][step], expected["cut_gradients"][step]
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_close(ours[key], theirs[key], tolerance, f"cut layer {key} of step {step}")
    assert told["server"].keys() == expected["server"].keys()
    for key, value in expected["server"].items():
        assert_close(told["server"][key], value, tolerance, f"server {key}")
    assert told["clients"].keys() == expected["clients"].keys()
    for client, state in expected["clients"].items():
        assert told["clients"][client].keys() == state.keys()
        for key, value in state.items():
            assert_close(told["clients"][client][key], value, tolerance, f"client {client} {key}")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    """Within ``tolerance`` of the tensor's largest entry."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    assert error <= tolerance, f"{what}: off by {error:.2e} of its largest entry"


@pytest.mark.parametrize("case", cases())
def test_distributed_training_equals_a_single_process(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    assert_equals_reference(experiment, told)


@pytest.mark.parametrize("case", cases())
def test_every_clients_tokenizers_change(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    first = assembly.build_tokenizers(experiment, load_data(experiment))
    first = {name: p for name, p in first.named_parameters() if p.requires_grad}
    for client, state in told["clients"].items():
        for key, value in state.items():
            assert not torch.equal(value, first[key]), f"client {client}: {key} never moved"


@pytest.mark.parametrize(
    "case",
    [
        *("4 clients on 2 workers", "retrieval global", "heads at clients, late"),
        *(*_with_gaps(), *coded_cases()),
    ],
)
def test_a_step_over_rpc_is_the_step_in_one_process_to_the_last_bit(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    users = experiment.method == "m2fedsa"
    method = users_in_one_process(experiment) if users else in_one_process(experiment)
    for step in range(STEPS):
        epoch, epoch_step = divmod(step, len(method.plan))
        if epoch_step == 0:
            method.begin_epoch(epoch)
        assert method.step(epoch_step, step) == told["losses"][step]
    for key, value in method.server.model.state_dict().items():
        assert torch.equal(told["server"][key], value), key
    for client, state in told["clients"].items():
        own = method.clients.fleet.host.clients[client].tokenizer_weights()
        for key, value in state.items():
            assert torch.equal(own[key], value), (client, key)


def test_a_client_that_never_hears_builds_no_tokenizer_of_sounds_and_sends_no_token_of_them(
    gold: dict,
) -> None:
    """Client 3; 0 and 2 never see, and drop what they drew numbers with for a picture's."""
    experiment, told = gold["gaps by client"]
    assert sorted(told["built"]) == [["image"], *[["image", "audio"]] * 3]
    held = {
        n: {name.split(".")[1] for name in state if name.startswith("by_modality")}
        for n, state in told["clients"].items()
    }
    assert held == {0: {"audio"}, 1: {"image", "audio"}, 2: {"audio"}, 3: {"image"}}
    splits, sent = load_data(experiment), told["bytes"]
    first = assembly.build_tokenizers(experiment, splits).by_modality
    token = experiment.model.encoder.width * torch.float64.itemsize
    # Of each sample its tokens, and two bytes of a mask; no gradient comes back for a mask.
    for client, modality in ((0, "audio"), (3, "image")):
        back = sent["cut_layer_gradients"][client]
        samples, rest = divmod(back, first[modality].length * token)
        assert samples and not rest and sent["activations"][client] == back + 2 * samples


@pytest.mark.parametrize("clients", [2, 16])
def test_one_encoder_pass_a_step_whatever_the_number_of_clients(
    clients: int, counted: dict
) -> None:
    _, told = counted[f"{clients} clients"]
    assert (told["forwards"], told["backwards"]) == (STEPS, STEPS)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Two and sixteen clients on four workers."""
    case = _case("early", "image+text", "float32")
    chosen = {
        "2 clients": {"clients": 2} | case,
        "16 clients": {"clients": 16, "clients_per_worker": 4} | case,
    }
    return run_gold(tmp_path_factory.mktemp("counted"), chosen)


@pytest.mark.campaign
@pytest.mark.parametrize("case", [n for n in cases() if "retrieval" not in n and "gaps" not in n])
def test_on_one_thread_it_equals_to_the_last_bit(case: str, gold: dict) -> None:
    experiment, told = gold[case]
    expected = reference.train(experiment, STEPS)
    assert told["losses"] == expected["losses"]
    for key, value in expected["server"].items():
        assert torch.equal(told["server"][key], value), key
    for client, state in expected["clients"].items():
        for key, value in state.items():
            assert torch.equal(told["clients"][client][key], value), (client, key)
