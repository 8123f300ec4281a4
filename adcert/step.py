"""One monitored step: what is watched while its block runs, and what the worker gets of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import compiled, distributed
from .analysis import StepAnalysis
from .assembly import Share
from .certificate import Certificate
from .errors import AdcertError
from .gradients import Examination, Sample
from .recorder import Recorder, recording
from .sharded import Shards
from .totals import COUNTS
from .watch import Watch


class Step:
    """One monitored step. ``summary`` and :meth:`certificate` are there once the ``with`` block has ended.

    They are made on the monitor's worker thread; asking for them waits for it. ``skipped``: why the step is not
    certified, or "": ``Monitor(every=...)`` has drawn another one of its window.
    """

    def __init__(
        self,
        number: int,
        plan: distributed.Plan,
        analysis: StepAnalysis | None,
        recorder: Recorder,
        skipped: str = "",
    ) -> None:
        self.number = number
        self.skipped = skipped
        self._plan = plan
        self._analysis = analysis
        self._recorder = recorder
        self._shards = Shards(plan.model) if plan.fsdp and analysis is not None else None
        self._watch = None
        if analysis is not None:
            known = None if self._shards is None else self._shards.harmless
            self._watch = Watch(recorder, self._on_root, self._on_gradients, known)
        self._ended = False
        self._examination = Examination()
        self._returned = False  # a gradient was returned, and not accumulated
        self._synced = True  # the last backward pass was one that DistributedDataParallel averages
        self._began = time.perf_counter()
        self._wait: Callable[[Callable[[], bool]], None] | None = None
        self._certificate: Certificate | None = None
        self._summary: dict[str, Any] = {}

    def loss(self, loss: Tensor) -> Tensor:
        """Name a root explicitly, before its backward pass runs out of sight (in C++, say). Returns the loss."""
        if self._ended:
            raise AdcertError("step.loss(...) was called after the step had ended")
        self._on_root([loss], None, True)
        return loss

    def certificate(self) -> Certificate:
        """The step's certificate; waits until it is made.

        Raises:
            AdcertError: inside the step's ``with`` block, if the block was left by an exception, or if the step was
                skipped.
        """
        if self.skipped:
            raise AdcertError(f"step {self.number} has no certificate: {self.skipped}")
        if self._wait is not None and self._certificate is None:
            self._wait(lambda: self._certificate is not None)
        if self._certificate is None:
            raise AdcertError("this step has no certificate: its block is still running or was left by an exception")
        return self._certificate

    @property
    def summary(self) -> dict[str, Any]:
        """The step's line of the log (:func:`summarize`); waits until it is made.

        Empty before the block has ended, and for a step that was skipped.
        """
        if self._wait is not None:
            self.certificate()
        return self._summary

    @property
    def settled(self) -> bool:
        """The block has ended and there is nothing to wait for: the verdict is there, or there will be none."""
        return self._ended and (self._wait is None or self._certificate is not None)

    def _on_root(self, roots: list[Tensor], inputs: Any, keep: bool) -> None:
        analysis, watch = self._analysis, self._watch
        if analysis is None or watch is None:
            return
        start = time.perf_counter()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                reason = "" if self._shards is None else self._shards.enter(roots, inputs, analysis.leaves, watch)
                if reason:  # the graph may lead to memory that is not there
                    analysis.failures[reason] = None
                    seen = list(self._recorder.records)
                else:
                    seen = analysis.root(roots, inputs, watch)
            except Exception as error:  # the user's training goes on; the step is undecided, loudly
                analysis.failures[f"the analysis failed with {type(error).__name__}: {error}"] = None
                seen = list(self._recorder.records)
        if not keep:
            for record in seen:
                record.release()
        analysis.seconds["analysis"] += time.perf_counter() - start

    def _on_gradients(self, inputs: Any, result: Any) -> None:
        """``result``: what autograd.grad returned for its ``inputs``; else the gradients are in ``.grad``."""
        analysis = self._analysis
        if analysis is None:
            return
        start = time.perf_counter()
        with torch.no_grad(), torch._C.DisableTorchFunction():
            try:
                self._synced = all(each.require_backward_grad_sync for each in self._plan.parallel)
                if result is None:
                    self._look(analysis)
                else:
                    self._returned = True
                    given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
                    names = [analysis.leaves.name(t) if t.is_leaf else "an input of autograd.grad" for t in given]
                    self._examination.look(zip(names, result, strict=False), self._recorder.streams)
            except Exception as error:  # the user's training goes on; the step is undecided, loudly
                analysis.failures[f"the gradients could not be examined ({type(error).__name__}: {error})"] = None
        analysis.seconds["analysis"] += time.perf_counter() - start

    def _unaveraged(self, leaves: Iterable[Tensor]) -> list[str]:
        """Why DistributedDataParallel may not have averaged the step's gradients."""
        grads = [leaf.grad for leaf in leaves]
        reasons = [self._plan.refusal(), self._plan.unfinished()]
        if grads and all(grad is None for grad in grads):
            reasons.append("no gradient was accumulated: DistributedDataParallel averages none")
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            reasons.append("sparse gradients are not compared between ranks: use dense ones (sparse=False)")
        if self._returned:
            reasons.append("torch.autograd.grad returns this rank's own gradient, which nobody averages")
        if not self._synced:
            reasons.append("the last backward pass ran under no_sync: nobody averages its gradient")
        return [reason for reason in reasons if reason]

    def _look(self, analysis: StepAnalysis) -> None:
        if self._shards is not None:
            gradients = self._shards.gradients()
        else:
            gradients = ((name, leaf.grad) for name, leaf in analysis.leaves.trainable().items())
        self._examination.look(gradients, self._recorder.streams)

    @contextmanager
    def _running(self) -> Iterator[None]:
        if self._watch is None:
            with recording(None):
                yield
        else:
            with compiled.seen(), recording(self._recorder), self._watch:
                yield

    def _share(self) -> Share:
        """What the worker needs; lets go of everything else."""
        analysis, watch = self._analysis, self._watch
        assert analysis is not None and watch is not None
        start = time.perf_counter()
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._look(analysis)
                if not analysis.roots:
                    analysis.failures.update(watch.problems)
                share = analysis.share(self._examination.found, (*self._plan.assumed, *watch.assumptions))
                leaves, team = analysis.leaves.trainable(), self._plan.team
                if self._shards is not None:
                    share = replace(share, sample=self._shards.sample())
                    reason = self._shards.left()
                    share.failures.extend([reason] if reason else [])
                elif team is not None and team.parallel:
                    share.failures.extend(self._unaveraged(leaves.values()))
                    share = replace(share, sample=Sample.of(leaves, self._recorder.streams))
        except Exception as error:  # the user's training goes on; the step is undecided, loudly
            share = Share([f"the analysis failed with {type(error).__name__}: {error}"], analysis.strict)
        now = time.perf_counter()
        share.seconds["analysis"] = analysis.seconds["analysis"] + now - start
        share.seconds["step"] = now - self._began
        self._summary = {"partial": analysis.pairs + analysis.joint.pairs}
        self._release()
        return share

    def _deliver(self, certificate: Certificate) -> None:
        self._summary = summarize(self.number, certificate) | self._summary
        self._certificate = certificate

    def _release(self) -> None:
        """Nothing of the step's graph outlives the step."""
        self._ended = True
        self._recorder.clear()
        if self._watch is not None:
            self._watch.forget()
        self._analysis = self._watch = self._shards = None


def summarize(number: int, certificate: Certificate) -> dict[str, Any]:
    """One line of the log: the verdict, totals, and the same per layer.

    ``seconds``: analysis = audit + rows on the training thread; of audit, ``device`` went by until a GPU had finished
    the forward pass; of rows, ``partial`` went into the partial backward engine and ``joint`` into the joint system;
    ``solve`` on the worker, after ``exchange`` where several ranks certify together.
    """
    counts = (*COUNTS, "blocks")
    kept = (*counts, "exemptions")
    layers = [{"name": layer.name, **{key: getattr(layer, key) for key in kept}} for layer in certificate.layers]
    exemptions: Counter[str] = Counter()
    for layer in certificate.layers:
        exemptions.update(layer.exemptions)
    return {
        "step": number,
        "verdict": str(certificate.verdict.value),
        "reasons": list(certificate.reasons),
        "system": certificate.system,
        "claim": certificate.claim,
        "theorem": certificate.theorem,
        **{key: sum(layer[key] for layer in layers) for key in counts},
        "exemptions": dict(exemptions),
        "seconds": {key: round(value, 6) for key, value in certificate.seconds.items()},
        "assumptions": list(certificate.assumptions),
        "layers": layers,
    }
