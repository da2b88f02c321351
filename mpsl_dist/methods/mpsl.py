"""Multimodal Parallel Split Learning, as the paper's section 3 has it.

One step: every client tokenizes its mini-batch; the server encodes the global batch once; every
client compares its slice of the predictions with its own labels; the server aggregates the losses
(Eq. 4) and runs one backward, which distributed autograd carries through all processes; every owner
steps its own optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor

from mpsl_dist.actors.assembly import build_tokenizers
from mpsl_dist.actors.choices import task_of, wire_of
from mpsl_dist.actors.cut_cache import cut_cache_of
from mpsl_dist.actors.deployable import Deployable
from mpsl_dist.actors.holdings import loaders_of, plan_of
from mpsl_dist.actors.local_data import Damage, TestData
from mpsl_dist.actors.server import Server
from mpsl_dist.config import Experiment
from mpsl_dist.config.methods import facts_of
from mpsl_dist.data import Splits
from mpsl_dist.data.loading import Unread
from mpsl_dist.errors import BackwardError, NonFiniteError
from mpsl_dist.methods import hosting, testing
from mpsl_dist.methods.by_key import Keys
from mpsl_dist.methods.hosting import BuildClients, Setup
from mpsl_dist.methods.link import Back, absent_from
from mpsl_dist.methods.masked import masks_of
from mpsl_dist.methods.objective import objective_of
from mpsl_dist.methods.progress import warn
from mpsl_dist.methods.server_group import ServerGroup, open_server
from mpsl_dist.methods.split_link import SplitLink, Step
from mpsl_dist.methods.sync import is_due, sync_of
from mpsl_dist.models.average import trainable_state
from mpsl_dist.models.tokenizers import Tokenizers
from mpsl_dist.records.traffic import Traffic
from mpsl_dist.runtime.answers import ClientsLost, Lost


class Mpsl:
    """MPSL, as the server sees it.

    Parameters
    ----------
    experiment : Experiment
    splits : Splits
        ``test`` is read where the server holds it; ``train`` never is.
    server : Server or ServerGroup
    clients : SplitLink
    tokenizers : Tokenizers
        The server's own copy, which receives averages for evaluation.
    """

    def __init__(
        self,
        experiment: Experiment,
        splits: Splits,
        server: Server | ServerGroup,
        clients: SplitLink,
        tokenizers: Tokenizers,
    ) -> None:
        self.experiment = experiment
        self.splits = splits
        self.server = server
        self.clients = clients
        self.tokenizers = tokenizers
        self.tests = TestData(splits.test, loaders=loaders_of(experiment, splits))
        self.task = task_of(splits)
        self.objective = objective_of(experiment, self.task)
        self.sync = sync_of(experiment)
        #: Steps that were begun again without a client.
        self.repeated = 0
        held = clients.describe()
        self.sizes = {client: held[client].samples for client in held}
        self.test_sizes = {client: held[client].test_samples for client in held}
        clients.keys = Keys(
            {name: x.numel() for name, x in trainable_state(tokenizers).items()},
            {n: told.modalities for n, told in held.items() if told.modalities},
            {n: told.trained for n, told in held.items() if told.trained},
        )
        epochs = experiment.training.epochs
        self.plan = plan_of(experiment, splits, list(self.sizes.values()))
        self.total_steps = len(self.plan) * epochs
        clients.cache = cut_cache_of(experiment, server)
        clients.masks = masks_of(experiment, tokenizers)
        clients.begin_training(len(self.plan), epochs)
        server.stepper.plan(len(self.plan), epochs)

    @property
    def traffic(self) -> Traffic:
        """Every byte that crossed."""
        return self.clients.traffic

    def welcome(self, back: Back) -> None:
        """Let clients go on that have come back."""
        steps, epochs = len(self.plan), self.experiment.training.epochs
        self.clients.begin_training(steps, epochs, back.fresh)
        if self.sync.identical:
            if self.clients.keys.modalities:  # others may lack what they have
                self.clients.restore_kept(back.fresh)
            self._begin_like_others(back.clients)
        else:
            own = self.clients.restore_kept(back.fresh)
            self._begin_like_others([n for n in back.fresh if n not in own])

    def _begin_like_others(self, clients: list[int]) -> None:
        """Have clients that have no state of their own continue from that of the others."""
        there = [n for n in self.clients.present if n not in clients]
        if not (clients and there):
            return
        if self.sync.identical:
            self.clients.hand_over(there, clients)
        else:
            mean = self.clients.mean_tokenizers(there, self.sizes, "return", "sync_up")
            if mean:
                self.clients.set_tokenizer_weights(mean, "return", clients)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Tell every client its part of each step of the epoch."""
        counts = {n: self.plan[:, n].tolist() for n in self.sizes}
        self.clients.begin_epoch(epoch, counts, first_step)

    def step(self, epoch_step: int, number: int) -> float | None:
        """Train one step, and again without those that were lost or skipped on the way.

        Parameters
        ----------
        epoch_step, number : int
            This step within the epoch and within the run, from 0.

        Returns
        -------
        float or None
            The global loss; None if no client was left to take part.

        Raises
        ------
        DivergedError
            If a loss or gradient is no finite number and ``faults.on_nonfinite`` is ``stop``, or
            nobody else is left.
        RemoteError
            If too few clients are left, or none may be lost.
        """
        return self._step_with(self.plan[epoch_step].nonzero()[0].tolist(), epoch_step, number)

    def _step_with(self, clients: Sequence[int], epoch_step: int, number: int) -> float | None:
        """Train one step with those of these clients that can take part."""
        wanted, again = set(clients), False
        while taking_part := self._there(wanted):
            try:
                return self._attempt(epoch_step, number, taking_part)
            except ClientsLost as error:
                self.clients.lose(error)
            except NonFiniteError as error:
                others = set(taking_part) - set(error.clients)
                skips = self.experiment.faults.on_nonfinite == "skip_client" and error.clients
                if not (skips and others):
                    raise
                warn(f"{error}; the step is repeated without")
                wanted = others
            except BackwardError as error:
                if again:
                    raise
                again = not self._lose_who_fails_alone(epoch_step, number, taking_part, error)
            self.repeated += 1
        return None

    def _there(self, wanted: Collection[int]) -> list[int]:
        return [n for n in self.clients.present if n in wanted]

    def _attempt(self, epoch_step: int, number: int, taking_part: list[int]) -> float:
        """Train one step with these clients; until its last line nothing has moved."""
        with self.clients.step(epoch_step, number, taking_part) as step:
            loss = self._backward(step)
            self.step_owners(step)
        return loss.item()

    def _backward(self, step: Step) -> Tensor:
        """Return the global loss, all its gradients being there."""
        smashed = step.tokenize()
        predictions = self.server.forward(smashed)
        loss = self.objective(step, predictions)
        step.backward(loss)
        return loss

    def _lose_who_fails_alone(
        self, epoch_step: int, number: int, taking_part: list[int], error: BackwardError
    ) -> bool:
        """Try every client's backward by itself, and lose those that fail; return whether any did.

        Raises
        ------
        BackwardError
            If none did, and ``faults.on_loss`` is ``stop``.
        """
        lost: dict[int, Lost] = {}
        for client in taking_part:
            try:
                with self.clients.step(epoch_step, number, [client]) as step:
                    self._backward(step)
            except BackwardError as alone:
                lost[client] = Lost(f"client {client}: {alone}", kind=BackwardError.__name__)
            except ClientsLost as alone:
                lost |= alone.by_client
            except NonFiniteError:
                continue
        if lost:
            self.clients.lose(ClientsLost(lost))
        elif self.experiment.faults.on_loss == "stop":
            raise error
        else:
            warn(f"{error}; every client's own succeeds, so the step is repeated")
        return bool(lost)

    def step_owners(self, step: Step) -> None:
        """Step the server's optimizer while the clients step theirs, as the sync has it."""
        due = is_due(self.sync, step.number, self.total_steps)
        wait = self.sync.begin(step, due)
        self.server.step(step.number, step.gradients())
        answers = wait()
        if due:
            self.sync.meet(self.clients, answers, step.number, self.sizes)

    def read_tests(self) -> Iterator[int]:
        """Read every test sample once, and yield how many can be read, batch by batch."""
        if self.experiment.data.test_at == "clients":
            return testing.read_at_clients(self)
        return map(len, self.tests.batches(self.experiment.training.test_batch_size))

    def damage_met(self) -> Damage:
        """Return how much of the data could not be read so far, by all that hold some."""
        return Damage.all([self.clients.damage_met(), Damage.of(Unread(), self.tests.unread)])

    def evaluate(self) -> dict[str, float]:
        """Test the server's model with the averaged tokenizers (section 3.3), or each client's own.

        Returns
        -------
        dict of str to float
            The task's metrics; where ``training.evaluate_own`` asks for it, also mean, minimum
            and maximum over the clients with their own tokenizers, as ``accuracy_own_mean``.
        """
        return testing.evaluate(self)

    def deployable(self) -> Deployable | None:
        """Return the averaged tokenizers joined with the server's part (section 3.3).

        None where every client has secret ones, of which an average would mean nothing.
        """
        if self.experiment.defences.secret_tokenizers:
            return None
        testing.fetch_average(self)
        wire = wire_of(self.experiment)
        return Deployable(self.tokenizers, self.server.whole_model(), self.task, wire)

    def trainable_parameters(self) -> dict[str, int]:
        """Return how many parameters one client and the server train."""
        parts = {"client": self.tokenizers, "server": self.server.model}
        return {
            owner: sum(p.numel() for p in part.parameters() if p.requires_grad)
            for owner, part in parts.items()
        }

    def save(self, folder: str) -> dict[str, str]:
        """Have every owner write its part of a checkpoint; return part -> SHA-256."""
        return self.clients.save(folder, lambda: self.server.save(folder))

    def damage(self, folder: str, files: Mapping[str, str]) -> str | None:
        """Say what is wrong with a checkpoint, having asked every owner; nothing if it is whole."""
        return self.clients.damage(folder, files)

    def restore(self, folder: str, files: Mapping[str, str]) -> None:
        """Have every owner continue from :meth:`save`."""
        self.clients.restore(folder, files, lambda: self.server.restore(folder))
        # Who was lost when the checkpoint was made.
        self._begin_like_others([n for n in self.sizes if absent_from(files, n)])


def build(
    setup: Setup, method: type[Mpsl] = Mpsl, clients: BuildClients = hosting.build_clients
) -> Mpsl:
    """Build the server here and the clients on the workers of a joined world."""
    experiment, splits = setup.experiment, setup.splits
    fleet = hosting.open_fleet(setup, clients)
    tokenizers = build_tokenizers(experiment, splits)
    server = open_server(setup, tokenizers.lengths)
    faults = experiment.faults if facts_of(experiment).tolerant else None
    link = SplitLink(fleet, Traffic(experiment.clients), faults)
    return method(experiment, splits, server, link, tokenizers.to(server.device))
