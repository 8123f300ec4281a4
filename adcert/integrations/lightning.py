"""A callback for Lightning: every optimiser step of ``trainer.fit`` is certified."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import AdcertError
from ..monitor import Monitor
from ..step import Step
from .block import Block
from .ranks import Ranks
from .scalars import Scalars

# Both packages may be installed; the program uses the one that it has imported.
if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class Certify(Callback):  # type: ignore[misc]  # the stubs of Lightning are not read
    """Certifies every step of ``Trainer.fit``, from the first ``training_step`` to just before the optimiser's step.

    A gradient accumulated over several batches is one step. The checkpoints of the trainer hold the monitor's state: a
    resumed ``fit`` goes on with its totals and its log (in the middle of an epoch Lightning goes on with other batches,
    unless the loader keeps a state). ``monitor`` is the run's, there while and after it trains.

    Of several processes under ``DDPStrategy`` (``strategy="ddp"``) the global batch is certified: every process has the
    same certificates, the first one writes the log.

    Convert the module first, ``adcert.convert(module)``: the swap keeps parameters, hooks and ``state_dict``.

    Args:
        scalars: log the numbers of each step to the trainer's loggers (as ``adcert/ties`` and so on, at the number of
            the step), once its verdict is there.
        options: of :class:`adcert.Monitor`, without the model.

    Raises:
        AdcertError: when ``fit`` begins, for manual optimisation (there the loop is yours: use
            ``adcert.Monitor``), for several processes under another strategy (FSDP, DeepSpeed, ...), and on every
            process if one of them cannot go on from the checkpoint; in a step, if the optimiser evaluates its closure
            more than once (LBFGS).
        UncertifiedError: from ``fit``, with ``on_fail="raise"``, before the optimiser's step.

    Example:
        >>> trainer = Trainer(callbacks=[Certify(log="run.jsonl")])  # doctest: +SKIP
        >>> trainer.fit(adcert.convert(module), batches)  # doctest: +SKIP
    """

    def __init__(self, *, scalars: bool = True, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._plot = scalars
        self._saved: dict[str, Any] = {}
        self._block: Block | None = None
        self._scalars: Scalars | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on with, the run."""
        if not pl_module.automatic_optimization:
            raise AdcertError(
                "with manual optimisation the callback cannot tell where a step begins: use adcert.Monitor in "
                "training_step, `with monitor.step(): self.manual_backward(loss)`"
            )
        ranks = Ranks(trainer.world_size, trainer.is_global_zero, type(trainer.strategy).__name__)
        self.monitor = ranks.begin(pl_module, trainer.strategy.model, self._options, self._saved)
        self._block = Block(self.monitor)
        self._scalars = Scalars(self.monitor)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless this batch adds to the gradient of the one before."""
        assert self._block is not None
        self._block.begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradient is complete, and neither clipped nor used yet."""
        assert self._block is not None
        if not self._block.is_open:
            raise AdcertError(
                f"{type(optimizer).__name__} evaluates its closure several times in one step, and only the first time "
                "would be certified: use another optimiser, or adcert.Monitor in a closure of your own"
            )
        self._log(trainer, self._block.end())

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """A step that no optimiser step ended has no verdict."""
        assert self._block is not None
        self._block.abort()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Wait for all verdicts and write the report."""
        self._close(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The step that failed is left; the verdicts before it are kept."""
        if self._block is not None:
            self._block.abort(exception)
            self._close(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        """The monitor's; a checkpoint amid an accumulated gradient does not hold it, and neither its step."""
        return self._saved if self._block is None else self._block.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._saved = state_dict

    def _close(self, trainer: Any, error: BaseException | None = None) -> None:
        assert self.monitor is not None and self._block is not None
        self._block.abort()
        self._log(trainer)
        self.monitor.__exit__(type(error) if error else None, error, None)
        self._saved = {}

    def _log(self, trainer: Any, step: Step | None = None) -> None:
        """The numbers of what has been decided; without a step of all there are."""
        if not self._plot or self._scalars is None or not trainer.is_global_zero:
            return
        if step is not None:
            self._scalars.add(step)
        for number, scalars in self._scalars.settled(wait=step is None):
            named = {f"adcert/{name}": float(value) for name, value in scalars.items()}
            for logger in trainer.loggers:
                logger.log_metrics(named, step=number)
