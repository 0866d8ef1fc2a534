"""What a run says while it lasts: a progress bar or plain lines, log.jsonl, knn.jsonl and other sinks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from fastmoco.runs.lines import KNN, LOG, Lines, read_lines, truncate
from fastmoco.train.sinks import open_sinks

DEFAULT_COLUMNS = 80
SILENT_KNN = 2000  # images of an evaluation that is announced by no line: some seconds to a minute
BAR = 8  # columns of the bar itself, and for the time to grow
BAR_AROUND = "{percentage:3.0f}%|| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's own


class Monitor:
    """Writes the lines of the main rank: to the terminal, log.jsonl, knn.jsonl and the sinks."""

    def __init__(
        self,
        run: Path,
        total: int,
        start: int = 0,
        *,
        tensorboard: bool = False,
        track: str = "none",
        dictionary: str = "queue",
        stream: TextIO | None = None,
    ) -> None:
        """`total` and `start` are steps of the whole run; lines of a log beyond `start` are dropped."""
        self.run, self.total, self.dictionary = run, total, dictionary
        self.stream = stream or sys.stderr
        for name in (LOG, KNN):
            truncate(run / name, start)
        lines = read_lines(run / LOG)
        self._elapsed_before = lines[-1]["seconds"] if lines else 0.0
        self._begin = time.perf_counter()
        self._log, self._knn = (Lines(run / name, self.say) for name in (LOG, KNN))
        self._bar = tqdm(
            total=total,
            initial=start,
            file=self.stream,
            unit="step",
            dynamic_ncols=True,
            disable=not self.stream.isatty(),
        )
        self._sinks = open_sinks(run, start, tensorboard, track)

    @property
    def seconds(self) -> float:
        """Time since the run began, resumed parts added up."""
        return self._elapsed_before + time.perf_counter() - self._begin

    def say(self, text: str) -> None:
        """One line for people, above the bar where there is one."""
        tqdm.write(text, file=self.stream) if not self._bar.disable else print(text, file=self.stream, flush=True)

    def advance(self) -> None:
        """A step is done."""
        self._bar.update()

    def jump(self, step: int) -> None:
        """Training goes on after `step`, having left some out."""
        self._bar.n = step
        self._bar.refresh()

    def interval(self, line: Mapping[str, float]) -> None:
        """A logging interval is known: write it everywhere."""
        line = {**line, "seconds": self.seconds}
        self._log.append(line)
        self._to_sinks(line)
        figures = [
            f"loss {line['loss']:.3f}",
            f"top1 {line['top1']:.1f}%",
            f"{line['pairs_per_s']:.1f} pairs/s",
            f"data wait {line['data_wait']:.0%}",
            f"top5 {line['top5']:.1f}%",
            f"lr {line['lr']:.2e}",
            *([f"{self.dictionary} {line['queue_filled']:.0%}"] if self.dictionary != "batch" else []),
            f"{line['memory']:.1f} GiB",
        ]
        if self._bar.disable:
            self.say(f"step {line['step']}/{self.total}  epoch {line['epoch']:.2f}  {'  '.join(figures)}")
        else:
            self._bar.set_postfix_str("  ".join(figures[: self._room_for(figures)]))

    def _room_for(self, figures: list[str]) -> int:
        # How many of the figures, the most telling first, the terminal shows whole: log.jsonl has them all.
        shown = self._bar.format_dict
        columns = shown["ncols"] or DEFAULT_COLUMNS
        for count in range(len(figures), 1, -1):
            more = {"ncols": None, "bar_format": BAR_AROUND, "postfix": "  ".join(figures[:count])}
            text = tqdm.format_meter(**{**shown, **more})
            if len(text) + BAR <= columns:
                return count
        return 1

    def knn_begins(self, step: int, images: int) -> None:
        """A kNN evaluation of so many images follows: one that takes long does not begin in silence."""
        if self._bar.disable and images > SILENT_KNN:
            self.say(f"kNN of {images} images after step {step} ...")

    def knn(self, line: Mapping[str, float]) -> None:
        """A kNN evaluation is done."""
        self._knn.append(line)
        self._to_sinks({"step": line["step"], "knn_top1": line["top1"], "knn_top5": line["top5"]})
        self.say(f"kNN after step {line['step']}: top-1 {line['top1']:.2f}%, top-5 {line['top5']:.2f}%")

    def close(self) -> None:
        """Close files and bar."""
        self._bar.close()
        self._log.close()
        self._knn.close()
        for sink in self._sinks:
            sink.close()

    def _to_sinks(self, line: Mapping[str, float]) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        for sink in self._sinks:
            sink.log(int(line["step"]), values)
