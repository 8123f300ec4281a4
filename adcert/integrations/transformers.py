"""A callback for the Trainer of Hugging Face transformers: every optimiser step of ``trainer.train`` is certified."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import AdcertError
from ..monitor import Monitor
from .block import Block


class Certify(TrainerCallback, ExportableState):  # type: ignore[misc]  # the library's own bases
    """Certifies every step of ``Trainer.train``, from its first batch to just before the optimiser's step.

    A gradient accumulated over several batches is one step; it may have been clipped when it is looked at, which does
    not change its direction. The trainer's checkpoints hold the monitor's state (in ``trainer_state.json``): a resumed
    ``train`` goes on with its totals and its log. ``monitor`` is the run's, there while and after it trains.

    The Trainer does not tell its callbacks of exceptions: a ``with`` block around ``train`` does, so that a step that
    fails is left. Convert the model first, ``adcert.convert(model)``: the swap keeps parameters, hooks and
    ``state_dict``.

    Args:
        options: of :class:`adcert.Monitor`, without the model.

    Raises:
        AdcertError: when ``train`` begins, outside the ``with`` block, and for several processes.
        UncertifiedError: from ``train``, with ``on_fail="raise"``, before the optimiser's step.

    Example:
        >>> with Certify(log="run.jsonl") as certify:  # doctest: +SKIP
        ...     Trainer(adcert.convert(model), arguments, train_dataset=data, callbacks=[certify]).train()
        >>> print(certify.monitor.report())  # doctest: +SKIP
    """

    def __init__(self, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._block: Block | None = None
        self._inside = False

    def __enter__(self) -> Certify:
        self._inside = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._inside = False
        self._finish(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on with, the run."""
        if not self._inside:
            raise AdcertError("use the callback in a with block, `with Certify() as certify:`, and train inside it")
        if args.world_size > 1:
            raise AdcertError(f"the callback certifies one process, this run has {args.world_size}")
        self._finish(None)
        monitor = Monitor(kwargs["model"], **self._options)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if saved["attributes"].get("saved"):
            monitor.load_state_dict(saved["attributes"]["saved"])
        self.monitor = monitor.__enter__()
        self._block = Block(monitor)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first batch of a step."""
        assert self._block is not None
        self._block.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradient is complete."""
        assert self._block is not None
        self._block.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for all verdicts and write the report."""
        self._finish(None)

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``."""
        saved = self.monitor.state_dict() if self.monitor is not None and self._block is not None else None
        return {"args": {}, "attributes": {"saved": saved}}

    def _finish(self, error: BaseException | None) -> None:
        if self._block is None or self.monitor is None:
            return
        with ExitStack() as stack:
            stack.callback(self.monitor.close)
            block, self._block = self._block, None
            block.abort(error)
