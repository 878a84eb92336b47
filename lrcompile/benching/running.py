"""The whole comparison: prepare the tasks, sweep learning rates, repeat the best with more seeds, measure costs.

Trials run in worker processes of one thread each. Every finished trial is a line of `trials.jsonl`, so an interrupted
run continues where it stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lrcompile.benching.contenders import REFERENCE_RANK, matched_rank, trained
from lrcompile.benching.costs import Cost, measure
from lrcompile.benching.task import Task
from lrcompile.benching.tasks import TASKS
from lrcompile.benching.trial import FROZEN, Trial, run
from lrcompile.deployment.describing import versions
from lrcompile.errors import SpecError

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Learning rates, of which a sweep starts in the middle and walks to where it is best."""
FIRST = (1, 2, 3)


@dataclass(frozen=True)
class Plan:
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    steps: int
    seeds: int
    rounds: int
    workers: int


@dataclass
class Contender:
    """One method on one task: its rank, what it trains, and the trials it has had."""

    task: str
    method: str
    rank: int
    trained: int
    higher_is_better: bool
    sweep: dict[float, float | None]
    finals: list[float | None]

    def best(self) -> float | None:
        """The learning rate with the best validation quality; None if all diverged."""
        valid = {lr: quality for lr, quality in self.sweep.items() if quality is not None}
        if not valid:
            return None
        return (max if self.higher_is_better else min)(valid, key=valid.__getitem__)

    def next_rates(self) -> list[float]:
        """Rates to try before the best one is known: it must not be at the end of those tried, nor of all."""
        if not self.sweep:
            return [RATES[index] for index in FIRST]
        best = self.best()
        tried = sorted(RATES.index(lr) for lr in self.sweep)
        where = tried[0] if best is None else RATES.index(best)
        return [RATES[i] for i in (where - 1, where + 1) if 0 <= i < len(RATES) and RATES[i] not in self.sweep]


def bench(plan: Plan, folder: Path, console: Console) -> dict[str, Any]:
    """Run `plan` in `folder` and return everything measured, as `result.json` holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [TASKS[name](folder) for name in plan.tasks]
    for task in tasks:
        console.print(f"{task.name}: preparing")
        task.prepare()
    done = _read(folder / "trials.jsonl")
    skipped: dict[str, dict[str, str]] = {task.name: {} for task in tasks}
    contenders = [each for task in tasks for each in _contenders(task, plan, skipped[task.name])]
    _trials(contenders, plan, folder, done, console)
    costs = {}
    for task in tasks:
        console.print(f"{task.name}: timing steps, every method beside the frozen model")
        costs[task.name] = measure(task, {c.method: c.rank for c in contenders if _adapts(c, task)}, plan.rounds)
    return {
        "plan": asdict(plan),
        "versions": versions(),
        "rates": RATES,
        "tasks": {
            task.name: _described(task, contenders, costs[task.name], done) | {"skipped": skipped[task.name]}
            for task in tasks
        },
    }


def _adapts(contender: Contender, task: Task) -> bool:
    return contender.task == task.name and contender.method != FROZEN


def _contenders(task: Task, plan: Plan, skipped: dict[str, str]) -> list[Contender]:
    """The frozen model and every method that can act on the task; `skipped` says why another cannot."""
    model = task.model()
    budget = trained("lora", model, REFERENCE_RANK, task.head)
    found = [Contender(task.name, FROZEN, 1, 0, task.higher_is_better, {}, [])]
    for method in plan.methods:
        try:
            rank = matched_rank(method, model, budget, task.head)
            count = trained(method, model, rank, task.head)
        except SpecError as error:
            skipped[method] = str(error)
            continue
        found.append(Contender(task.name, method, rank, count, task.higher_is_better, {}, []))
    return found


def _trials(contenders: Sequence[Contender], plan: Plan, folder: Path, done: dict[str, Any], console: Console) -> None:
    """Sweeps first walk to their best rate, then its seeds follow; workers are never idle while a trial is left."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers, read when they import torch
    waiting: dict[Future, tuple[Contender, Trial]] = {}
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    workers = ProcessPoolExecutor(plan.workers, context, _leave_with, (os.getpid(),))
    with workers as pool, Progress(*columns, console=console) as bar:
        shown = bar.add_task("trials", total=0)

        def start(contender: Contender) -> None:
            """Submit what it needs next; a run that goes on decides as the one that was interrupted would have."""
            while trials := _next(contender, plan):
                left = [trial for trial in trials if trial.key not in done]
                for trial in trials:
                    if trial.key in done:
                        _take(contender, trial, done[trial.key]["quality"])
                for trial in left:
                    bar.update(shown, total=(bar.tasks[shown].total or 0) + 1)
                    waiting[pool.submit(run, trial, folder)] = (contender, trial)
                if left:
                    return

        for contender in contenders:
            start(contender)
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                contender, trial = waiting.pop(future)
                result = future.result()
                done[trial.key] = result
                with (folder / "trials.jsonl").open("a") as file:
                    file.write(json.dumps(result) + "\n")
                _take(contender, trial, result["quality"])
                bar.update(shown, advance=1, description=f"{trial.task} {trial.method} lr {trial.lr:g}")
                if not any(other is contender for other, _ in waiting.values()):
                    start(contender)


def _leave_with(parent: int) -> None:
    """In a worker: end when whoever started it was killed, which closes no pipe of its siblings."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _next(contender: Contender, plan: Plan) -> list[Trial]:
    """The trials a contender needs now, knowing what it knows."""

    def trial(lr: float, seed: int, part: str) -> Trial:
        return Trial(contender.task, contender.method, contender.rank, lr, seed, plan.steps, part)

    if contender.method == FROZEN:
        left = range(len(contender.finals), plan.seeds)
        return [trial(0.0, seed + 1, "test") for seed in left]
    if rates := contender.next_rates():
        return [trial(lr, 0, "validation") for lr in rates]
    best = contender.best()
    if best is None:
        return []
    return [trial(best, seed + 1, "test") for seed in range(len(contender.finals), plan.seeds)]


def _take(contender: Contender, trial: Trial, quality: float | None) -> None:
    if trial.part == "validation":
        contender.sweep[trial.lr] = quality
    else:
        contender.finals.append(quality)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    results = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    names = Trial.__dataclass_fields__
    return {Trial(**{name: each[name] for name in names}).key: each for each in results}


def _described(
    task: Task, contenders: Iterable[Contender], costs: Mapping[str, Cost], done: Mapping[str, Any]
) -> dict[str, Any]:
    rows = {}
    for each in contenders:
        if each.task != task.name:
            continue
        finals = [quality for quality in each.finals if quality is not None]
        rows[each.method] = {
            "rank": each.rank,
            "trained": each.trained,
            "sweep": {f"{lr:g}": quality for lr, quality in sorted(each.sweep.items())},
            "lr": each.best(),
            "quality": finals,
            "mean": statistics.fmean(finals) if finals else None,
            "half_width": half_width(finals),
            **(asdict(costs[each.method]) if each.method in costs else {}),
        }
    seconds = [result["seconds"] for result in done.values() if result["task"] == task.name]
    return {"metric": task.metric, "higher_is_better": task.higher_is_better, "seconds": sum(seconds), "methods": rows}


_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean (Student's t); None below two values."""
    if len(values) < 2:
        return None
    return _STUDENT.get(len(values), 1.96) * statistics.stdev(values) / len(values) ** 0.5
