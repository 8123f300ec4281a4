"""The per-step driver: ``certify`` for one step, ``Monitor`` for a training run with its log."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import distributed, state
from .analysis import StepAnalysis
from .assembly import Share, assemble
from .certificate import Certificate, Verdict
from .conclusion import conclude, failed
from .errors import AdcertError, UncertifiedError
from .lists import Rooms
from .log import Log
from .recorder import Recorder, running
from .sampling import count_drawn, drawn
from .step import Step
from .systems import Memory
from .totals import Report, Totals
from .worker import Bounds, Desk

ON_FAIL = ("record", "raise")
_QUEUE_BYTES = 256 << 20  # of rows that wait for the worker


class Monitor:
    """Certifies every step of a training run.

    Args:
        model: the model, converted or not; its parameters name the certificate's.
        on_fail: what a step that is not certified does: "record" (default), or "raise" an
            :class:`~adcert.errors.UncertifiedError` when its block ends.
        log: path of a JSON-lines file, one object per step and the report at the end; appended to if it exists.
        strict: use the paper's Algorithm 1 only.
        keep: how many of the latest certificates ``certificates`` holds.
        queue: how many steps may wait for the worker thread that decides their systems, proves the answers and writes
            the log; a step that finds the queue full waits (and so it does while more than 256 MiB are waiting).
            0: no thread, each step is concluded when its block ends.
        every: certify one step of each ``every`` consecutive ones, drawn uniformly (:func:`adcert.sampling.drawn`);
            the others run as if there was no monitor. The random state of the program is not used.
        seed: of that draw; the same one gives the same steps.
        group: the ranks of a data-parallel step, whose certificate is about the averaged gradient: by default those of
            a DistributedDataParallel model, or of one that ``fully_shard`` has sharded; a process group of
            torch.distributed whose ranks average the gradients of equal models; or "local" for this process's own
            gradient. Every rank makes its monitor at the same place.

    Raises:
        AdcertError: for arguments it does not know, and for a model that is not parallel where torch.distributed runs
            several ranks and no group is named.

    Example:
        >>> import torch, adcert
        >>> model = adcert.convert(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)))
        >>> with adcert.Monitor(model) as monitor:
        ...     with monitor.step() as step:
        ...         model(torch.ones(2, 3)).sum().backward()
        >>> step.certificate().verdict.value, monitor.report().certified
        ('certified', 1)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        on_fail: str = "record",
        log: str | os.PathLike[str] | None = None,
        strict: bool = False,
        *,
        keep: int = 16,
        queue: int = 8,
        every: int = 1,
        seed: int = 0,
        group: Any = None,
    ) -> None:
        if on_fail == "repair":
            raise AdcertError('on_fail="repair" is not built yet; use "record" or "raise"')
        if on_fail not in ON_FAIL:
            raise AdcertError(f"on_fail must be one of {ON_FAIL}, got {on_fail!r}")
        if not isinstance(model, torch.nn.Module):
            raise AdcertError(f"Monitor needs the torch.nn.Module that is trained, got {type(model).__name__}")
        if isinstance(queue, bool) or not isinstance(queue, int) or queue < 0:
            raise AdcertError(f"queue is the number of steps that may wait, an int >= 0, got {queue!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise AdcertError(f"every is the number of steps of which one is certified, an int >= 1, got {every!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise AdcertError(f"seed, of the draw of the steps that are certified, is an int, got {seed!r}")
        self.model = model
        self._plan = distributed.plan(model, group)
        self.on_fail = on_fail
        self.strict = strict
        self.every = every
        self.seed = seed
        self.certificates: deque[Certificate] = deque(maxlen=keep)
        self._log = None if log is None else Log(log)
        self._log_error: OSError | None = None
        self._totals = Totals()
        self._memory = Memory()
        self._rooms = Rooms()
        self._left = False
        self._desk: Desk[tuple[Step, Share]] = Desk(self._conclude, self._lost, Bounds(queue, _QUEUE_BYTES))

    def __enter__(self) -> Monitor:
        if self._log is not None:
            self._log.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(together=kind is None)

    def flush(self) -> None:
        """Wait until every step has its verdict and its line in the log.

        Raises:
            AdcertError: if a line could not be written; the verdicts themselves are in the totals.
        """
        self._desk.flush()
        if self._log_error is not None:
            error, self._log_error = self._log_error, None
            assert self._log is not None
            raise AdcertError(f"cannot write the log {self._log.path}: {error}") from error

    def close(self) -> None:
        """:meth:`flush`, write the report as the last line of the log, if there was a step, and close it.

        A second call does nothing.

        Nor does a call in a forked process: the steps and the log are the parent's. Ranks close together.

        Raises:
            AdcertError: if a line of the log could not be written, or the ranks have had different numbers of steps.
        """
        self._close(together=True)

    def _close(self, together: bool) -> None:
        if self._desk.foreign():
            return
        team = self._plan.team
        try:
            self.flush()
            if self._log is not None and self._log.is_open:
                if self._totals.steps:
                    self._log.write({"report": asdict(self.report())})
                self._log.close()
        except BaseException:
            together = False
            raise
        finally:
            if team is not None and not together and not self._left:
                self._left = True  # by an exception, which the others need not wait for
                team.leave("the monitor was left by an exception")
        if team is not None and not self._left:
            team.end(self._totals.steps)

    @contextmanager
    def step(self) -> Iterator[Step]:
        """Monitor one step: everything the model computes in the block, and every backward pass of it.

        With ``every`` > 1 a step that is not drawn runs without being watched; the one it gives says so (``skipped``).

        Raises:
            AdcertError: if a step is already running on this thread, or a CUDA graph is being captured.
            UncertifiedError: with ``on_fail="raise"``, if the step is not certified.
        """
        if running():
            raise AdcertError("a monitored step is already running on this thread: steps do not nest")
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise AdcertError("a CUDA graph is being captured: its replays would run no analysis")
        step = self._next()
        try:
            with step._running():
                yield step
            share = None if step.skipped else step._share()
        except BaseException:
            self._totals.aborted += not step.skipped
            step._release()
            raise
        if share is None:
            step._release()
            return
        step._wait = self._desk.wait
        self._desk.submit((step, share), share.nbytes)
        if self.on_fail == "raise" and step.certificate().verdict is not Verdict.CERTIFIED:
            certificate = step.certificate()
            raise UncertifiedError(
                f"step {step.number} is {certificate.verdict.value}: " + "; ".join(certificate.reasons)
            )

    def _next(self) -> Step:
        self._totals.steps += 1
        number = self._totals.steps
        chosen = drawn(number, self.every, self.seed)
        if number != chosen:
            why = f"with every={self.every} one step of {self.every} is certified, in its window step {chosen}"
            return Step(number, self._plan, None, Recorder({}, self._rooms), why)
        self._totals.sampled += 1
        model, refusal = self._plan.model, self._plan.refusal()
        names = {id(module): name for name, module in model.named_modules()}
        analysis = StepAnalysis(model, self.strict)
        if refusal:
            analysis.failures[refusal] = None
        return Step(number, self._plan, analysis, Recorder(names, self._rooms))

    def _conclude(self, job: tuple[Step, Share]) -> None:
        step, share = job
        team = self._plan.team
        with torch._C.DisableTorchFunction():  # a mode of the user's thread, a default device say, is not for us
            if team is None:
                certificate = conclude(assemble(share), self._memory)
            else:
                certificate = team.conclude(step.number, share, self._memory)
        self._account(step, certificate)

    def _lost(self, job: tuple[Step, Share], reason: str) -> None:
        step, share = job
        if step._certificate is None:  # else the verdict stands, and the log's trouble is told by flush
            try:
                observed = assemble(share)
            except Exception:  # which may be what was lost
                observed = assemble(Share(share.failures, share.strict))
            self._account(step, failed(observed, reason))

    def _account(self, step: Step, certificate: Certificate) -> None:
        step._deliver(certificate)
        summary = step._summary
        summary["every"] = self.every
        self.certificates.append(certificate)
        self._totals.add(summary)
        if self._log is not None and self._log.is_open:
            try:
                self._log.write(summary)
            except OSError as error:
                self._log_error = error

    def report(self) -> Report:
        """Totals of all steps so far; waits for their verdicts."""
        self._desk.flush()
        return self._totals.report(self.every)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed job needs to go on with the totals, the draw of the steps and the log; waits for all verdicts.

        Numbers, strings, dicts and None only. Save it together with the model's and the optimiser's, between two steps.

        Raises:
            AdcertError: while a step is running, or if a line of the log could not be written.

        Example:
            >>> import torch, adcert
            >>> model = torch.nn.Linear(1, 1)
            >>> monitor, resumed = adcert.Monitor(model), adcert.Monitor(model)
            >>> with monitor.step():
            ...     model(torch.ones(1, 1)).sum().backward()
            >>> resumed.load_state_dict(monitor.state_dict())
            >>> resumed.report() == monitor.report()
            True
        """
        if running():
            raise AdcertError("a step is running: take the monitor's state between two steps")
        return self._state()

    def _state_before(self) -> dict[str, Any]:
        """While a step is running: the state before it began, so that whoever resumes does it again."""
        chosen = drawn(self._totals.steps, self.every, self.seed) == self._totals.steps
        self._totals.steps -= 1
        self._totals.sampled -= chosen
        try:
            return self._state()
        finally:
            self._totals.steps += 1
            self._totals.sampled += chosen

    def _state(self) -> dict[str, Any]:
        self.flush()
        return {
            "format": state.FORMAT,
            "version": state.VERSION,
            **self._options(),
            "totals": self._totals.state(),
            "rooms": self._rooms.state(),
            "log": None if self._log is None else self._log.state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Nothing changes if it raises.

        The log must be the one of the saved job. What it holds beyond the state, lines of steps that the killed job did
        afterwards and will be done again, moves to ``LOG.superseded``, so that lines and totals agree. A monitor with a
        log that goes on from a state without one begins it with a line ``{"resumed": totals so far}``. Verdicts and
        counts are those of a job that was not killed; a witness may be another one, where an earlier step's was tried.

        Args:
            saved: by a monitor with the same ``every``, ``seed`` and ``strict``.

        Raises:
            AdcertError: if the state is damaged, of something else or of another version; if options differ; if steps
                were monitored already; if the log is not the one that belongs to the state.
        """
        if self._totals.steps:
            raise AdcertError("this monitor has seen steps already: load the state into a new one, before the first")
        found = state.opened(saved, self._options(), ("totals", "rooms", "log"))
        totals = Totals.restored(found["totals"])
        if totals.sampled != count_drawn(totals.steps, self.every, self.seed):
            raise state.damaged(f"{totals.sampled} of {totals.steps} steps were not what every={self.every} draws")
        rooms = state.counts(found["rooms"], "rooms")
        if self._log is not None and found["log"] is not None:
            self._log.resume(found["log"], totals.steps)
        elif self._log is not None:
            self._log.begin({"resumed": asdict(totals.report(self.every))})
        self._totals = totals
        self._rooms.restore(rooms)

    def _options(self) -> dict[str, Any]:
        return {"strict": self.strict, "every": self.every, "seed": self.seed}


def certify(
    closure: Callable[[], Tensor], model: torch.nn.Module, strict: bool = False, *, group: Any = None
) -> Certificate:
    """Run one forward and backward pass and tell whether AD's gradient is a Clarke subgradient.

    Args:
        closure: returns the scalar loss; it must not call backward. Gradients accumulate into ``.grad`` as usual.
        model: names the parameters; functional calls inside the closure are seen as well.
        strict: the paper's Algorithm 1 (Theorem 8) only, without E1-E4.
        group: see :class:`Monitor`; the ranks call it together.

    Returns:
        A :class:`Certificate`: CERTIFIED means the gradient, up to rounding, is an element of the Bouligand
        subdifferential of the loss around the recorded values (README, "Floating point").

    Raises:
        AdcertError: if the closure does not return a scalar tensor that requires grad, or a step is running already.

    Example:
        >>> import torch, adcert
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> model = torch.nn.ParameterList([w])
        >>> adcert.certify(lambda: (torch.relu(w) - torch.relu(-w)).sum(), model).verdict.value
        'uncertified'
    """
    with Monitor(model, strict=strict, queue=0, group=group).step() as step:
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise AdcertError("the closure must return the loss as a tensor with one element")
        if not loss.requires_grad:
            raise AdcertError("the loss does not require grad: nothing trainable was used, or grad mode is off")
        loss.backward()  # type: ignore[no-untyped-call]
    return step.certificate()
