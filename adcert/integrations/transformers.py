"""A callback for the Trainer of Hugging Face transformers: every optimiser step of ``trainer.train`` is certified."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import AdcertError
from ..monitor import Monitor
from .block import Block
from .ranks import Ranks


class Certify(TrainerCallback, ExportableState):  # type: ignore[misc]  # the library's own bases
    """Certifies every step of ``Trainer.train``, from its first batch to just before the optimiser's step.

    A gradient accumulated over several batches is one step; it may have been clipped when it is looked at, which does
    not change its direction. The trainer's checkpoints hold the monitor's state (in ``trainer_state.json``): a resumed
    ``train`` goes on with its totals and its log. ``monitor`` is the run's, there while and after it trains.

    The Trainer does not tell its callbacks of exceptions: a ``with`` block around ``train`` does, so that a step that
    fails is left. Convert the model first, ``adcert.convert(model)``: the swap keeps parameters, hooks and
    ``state_dict``.

    Of several processes, whose gradients ``DistributedDataParallel`` averages, the global batch is certified: every
    process has the same certificates, the first one writes the log. The Trainer shows its callbacks only the model
    inside: hand the trainer over, ``with Certify(trainer)``, instead of the callback to the trainer.

    Args:
        trainer: gets the callback for the time of the block; needed for several processes.
        options: of :class:`adcert.Monitor`, without the model.

    Raises:
        AdcertError: when ``train`` begins, outside the ``with`` block, for several processes without ``trainer`` or
            under FSDP, DeepSpeed and the like, and on every process if one of them cannot go on from the checkpoint.
        UncertifiedError: from ``train``, with ``on_fail="raise"``, before the optimiser's step.

    Example:
        >>> with Certify(log="run.jsonl") as certify:  # doctest: +SKIP
        ...     Trainer(adcert.convert(model), arguments, train_dataset=data, callbacks=[certify]).train()
        >>> print(certify.monitor.report())  # doctest: +SKIP
        >>> with Certify(trainer, log="run.jsonl"):  # under torchrun, too  # doctest: +SKIP
        ...     trainer.train()
    """

    def __init__(self, trainer: Any = None, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._trainer = trainer
        self._options = options
        self._block: Block | None = None
        self._inside = False

    def __enter__(self) -> Certify:
        self._inside = True
        if self._trainer is not None:
            self._trainer.add_callback(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._inside = False
        if self._trainer is not None:
            self._trainer.pop_callback(self)
        self._finish(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on with, the run."""
        if not self._inside:
            raise AdcertError("use the callback in a with block, `with Certify() as certify:`, and train inside it")
        if args.world_size > 1 and self._trainer is None:
            raise AdcertError(
                f"of {args.world_size} processes the callback has to see what averages their gradients: make the "
                "trainer without the callback, and train inside `with Certify(trainer) as certify:`"
            )
        self._finish(None)
        wrapped = kwargs["model"] if self._trainer is None else self._trainer.model_wrapped
        ranks = Ranks(args.world_size, args.process_index == 0, type(wrapped).__name__)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.monitor = ranks.begin(kwargs["model"], wrapped, self._options, saved["attributes"].get("saved"))
        self._block = Block(self.monitor)

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
            stack.callback(self.monitor.__exit__, type(error) if error else None, error, None)
            block, self._block = self._block, None
            block.abort(error)
