"""Where tasks run: in this process, in several processes, or on a Ray cluster.

A task is a picklable callable that writes what it finds to files, handles its own exceptions, and takes one argument,
to which it reports progress. An executor is told which tasks to run and says which have ended; what it adds is to
survive the death of a worker.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from heed.compare.progress import Progress, Report
from heed.errors import MissingExtra

Task = Callable[[Report], None]

POLL_SECONDS = 0.2


class Executor(Protocol):
    """Runs tasks.

    Args:
        parallel: how many tasks run at once.
    """

    parallel: int

    def run(
        self, tasks: Sequence[Task], report: Report, *, one_by_one: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        """Run the tasks; yields the index of each as it ends, with a line if its worker died instead.

        Args:
            tasks: what to run.
            report: gets the progress, in this process.
            one_by_one: never two at once.
        """
        ...


class InProcess:
    """One task after the other, in this process."""

    parallel = 1

    def run(
        self, tasks: Sequence[Task], report: Report, *, one_by_one: bool = True
    ) -> Iterator[tuple[int, str | None]]:
        del one_by_one  # there is no other way here
        for index, task in enumerate(tasks):
            task(report)
            yield index, None


class Processes:
    """Several processes on this machine.

    Args:
        jobs: how many.
    """

    def __init__(self, jobs: int) -> None:
        self.parallel = jobs

    def run(
        self, tasks: Sequence[Task], report: Report, *, one_by_one: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager:
            news = manager.Queue()
            workers = 1 if one_by_one else self.parallel
            interrupted = []
            for index, died in self._pool(context, range(len(tasks)), tasks, news, report, workers):
                if died:
                    interrupted.append(index)
                else:
                    yield index, None
            # The death of one worker ends the pool, and the innocent with it. Each gets a pool of its own to show
            # whether it was the one; those with checkpoints lose little.
            for index in interrupted:
                for _, died in self._pool(context, [index], tasks, news, report, 1):
                    yield index, "its process died without an error (killed, perhaps for memory?)" if died else None

    def _pool(
        self, context: Any, chosen: Sequence[int], tasks: Sequence[Task], news: Any, report: Report, workers: int
    ) -> Iterator[tuple[int, bool]]:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
        try:
            futures: dict[Future[None], int] = {pool.submit(_call, tasks[i], news): i for i in chosen}
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                _pass_on(news, report)
                for future in done:
                    died = isinstance(future.exception(), BrokenProcessPool)
                    if not died:
                        future.result()
                    yield futures[future], died
        finally:
            pool.shutdown(cancel_futures=True)


class OnRay:
    """A Ray cluster. heed must be installed on its machines, and the folder of the run visible to them all.

    Args:
        address: of the cluster; "local" starts one on this machine. A connection that is already open is used.
        threads: CPUs that each task asks for.
        accelerator: whether each task asks for a GPU where the cluster has any.

    Raises:
        ConnectionError: there is no cluster at the address.
        MissingExtra: Ray is not installed.
    """

    def __init__(self, address: str, threads: int, *, accelerator: bool) -> None:
        try:
            import ray
            import ray.exceptions
        except ImportError as error:
            raise MissingExtra("ray", "ray") from error
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        resources = ray.cluster_resources()
        gpus = 1 if accelerator and resources.get("GPU", 0) >= 1 else 0
        self.parallel = max(1, int(resources["GPU"] if gpus else resources.get("CPU", 1) // threads))
        self._ray, self._failure = ray, ray.exceptions.RayError
        # A task goes on from its checkpoint when it is run again, so one more try is cheap.
        self._remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(_call)

    def run(
        self, tasks: Sequence[Task], report: Report, *, one_by_one: bool = False
    ) -> Iterator[tuple[int, str | None]]:
        from ray.util.queue import Queue

        news = Queue(actor_options={"num_cpus": 0})
        try:
            if one_by_one:
                for index in range(len(tasks)):
                    yield from self._wait(tasks, [index], news, report)
            else:
                yield from self._wait(tasks, range(len(tasks)), news, report)
        finally:
            news.shutdown()

    def _wait(
        self, tasks: Sequence[Task], chosen: Sequence[int], news: Any, report: Report
    ) -> Iterator[tuple[int, str | None]]:
        running = {self._remote.remote(tasks[index], news): index for index in chosen}
        while running:
            done, _ = self._ray.wait(list(running), timeout=POLL_SECONDS)
            _pass_on(news, report)
            for reference in done:
                died = None
                try:
                    self._ray.get(reference)
                except self._failure as error:
                    died = f"its Ray worker failed: {str(error).strip().splitlines()[-1]}"
                yield running.pop(reference), died


def _call(task: Task, news: Any) -> None:
    """Run a task in a worker. News travels as tuples, so that the queue's own process need not import heed."""
    task(lambda progress: news.put(dataclasses.astuple(progress)))


def _pass_on(news: Any, report: Report) -> None:
    while not news.empty():
        try:
            report(Progress(*news.get_nowait()))
        except queue.Empty:
            return


def _end_with_parent() -> None:
    """Make a worker end when its parent is killed; it must not write beside the run that takes over."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
