# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Learns several differences at once on one device, with one UNet call for all of them.

A single difference sends 2 to 12 latents through the UNet at a time, which may not fill a large GPU. Here each difference
is learned by a thread with a pipeline of its own, and all pipelines share their models. Only one thread works at a time. It
gives way where it needs the UNet, and once every thread does, one call answers all of them. Gradients are joined likewise.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline_difference_inversion import DifferenceInversionPipeline


@dataclass
class Request:
    """What a thread waits for: a prediction of the UNet, or the gradient of a loss."""

    inputs: tuple | None = None  # latents, time steps and conditions
    loss: torch.Tensor | None = None
    with_gradients: bool = False
    output: torch.Tensor | None = None
    error: Exception | None = None
    done: bool = False

    @property
    def kind(self) -> tuple:
        """Requests of one kind can share a call."""
        latents, _, condition = self.inputs
        return self.with_gradients, latents.shape[1:], condition.prompt_embeds.shape[1:]


class Joint:
    """Runs jobs in threads, one of which works at a time, and joins what they ask of the UNet.

    Args:
        predict: the UNet's prediction (batch, ...) from latents, time steps (batch,) and conditions.
    """

    def __init__(self, predict: Callable):
        self.predict = predict
        self.turn = threading.Condition()  # held by the thread that works
        self.waiting: list[Request] = []
        self.num_threads, self.stopped = 0, False

    def run(self, jobs: Iterable, workers: list[Callable[[Any], Any]]) -> list:
        """What the workers make of the jobs, in the order in which they are done; each takes the next one that is left.

        Raises:
            Exception: the first that a worker did not handle. The other workers end their jobs before.
        """
        jobs, results, errors = iter(jobs), [], []

        def work(worker: Callable) -> None:
            with self.turn:
                try:
                    while not (errors or self.stopped) and (job := next(jobs, self)) is not self:
                        results.append(worker(job))
                except Exception as error:
                    errors.append(error)
                finally:
                    self.num_threads -= 1
                    self._answer_if_all_wait()

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
        self.num_threads = len(threads)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            self.stopped = True
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join()
            raise
        if errors:
            raise errors[0]
        return results

    def ask(self, request: Request) -> torch.Tensor | None:
        """Waits until all other threads have asked too, or have ended; returns the prediction, if one was asked for."""
        if self.stopped:
            raise SystemExit  # of this thread
        self.waiting.append(request)
        self._answer_if_all_wait()
        while not request.done:
            self.turn.wait()  # another thread works
        if request.error is not None:
            raise request.error
        return request.output

    def _answer_if_all_wait(self) -> None:
        if not self.waiting or len(self.waiting) < self.num_threads:
            return
        asked, self.waiting = self.waiting, []
        # Losses whose graphs are joined are always here together, since each thread's next request is for its gradient.
        self._answer([r for r in asked if r.loss is not None], self._go_back)
        kinds: dict[tuple, list[Request]] = {}
        for request in asked:
            if request.loss is None:
                kinds.setdefault(request.kind, []).append(request)
        for alike in kinds.values():
            self._answer(alike, self._go_forth)
        self.turn.notify_all()

    @staticmethod
    def _answer(requests: list[Request], how: Callable[[list[Request]], None]) -> None:
        """An error, such as too little memory, is raised in each of the threads that asked."""
        error = None
        try:
            if requests:
                how(requests)
        except Exception as raised:
            error = raised
        for request in requests:
            request.error, request.done = error, True

    @staticmethod
    def _go_back(requests: list[Request]) -> None:
        torch.autograd.backward([request.loss for request in requests])

    def _go_forth(self, requests: list[Request]) -> None:
        latents, timesteps, conditions = zip(*(request.inputs for request in requests), strict=True)
        together = conditions[0]
        for condition in conditions[1:]:
            together = together.followed_by(condition)
        with torch.set_grad_enabled(requests[0].with_gradients):
            outputs = self.predict(torch.cat(latents), torch.cat(timesteps), together)
            for request, output in zip(requests, outputs.split([len(part) for part in latents]), strict=True):
                request.output = output


class JoinedPipeline(DifferenceInversionPipeline):
    """A pipeline whose UNet calls while learning are joined with those of others."""

    joint: Joint
    # Without the locks by which pipelines that share models wait for each other: only one of these works at a time.
    invert_difference = DifferenceInversionPipeline.invert_difference.__wrapped__

    def _unet_output(self, latents, t, condition):
        return self.joint.ask(Request(inputs=(latents, t, condition), with_gradients=torch.is_grad_enabled()))

    def _backward(self, loss):
        self.joint.ask(Request(loss=loss))


def joined(pipe: DifferenceInversionPipeline, count: int) -> tuple[Joint, list[JoinedPipeline]]:
    """As many pipelines over the models of this one, which stay frozen, and what joins their calls."""
    joint, pipes = Joint(pipe._unet_output), []
    for model in pipe._models():
        model.eval().requires_grad_(False)
    for _ in range(count):
        one = JoinedPipeline.from_pipe(pipe)
        one.joint, one._once = joint, {}
        one.set_progress_bar_config(disable=True)
        pipes.append(one)
    return joint, pipes
