"""What a terminal shows while a run works: one line that is redrawn. Elsewhere (a file, a pipe, a
notebook) it is a plain line every 10 s."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from importlib.util import find_spec

REDRAW = 0.25  # s between two drawings of the line on a terminal
PLAIN = 10.0  # s between two lines elsewhere
PACE = 10.0  # s of which the transitions a second are shown
WORDS = {
    "setup": "setting up",
    "pretrain": "pre-training",
    "cache": "encoding",
    "baselines": "tuning baselines",
    "rollout": "learning",
    "learn": "learning",
    "eval": "evaluating",
    "io": "saving",
    "report": "writing the report",
    "upload": "uploading",
}


class Unbreakable:
    """A stream whose reader may go away (`| head`, a closed terminal) without ending the run.

    What is written to it stands above the progress line, if there is one.
    """

    line = None  # the tqdm bar on this terminal

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        line = Unbreakable.line
        if line is None:
            self._try("write", text)
            return len(text)
        with line.get_lock():
            if line.above.endswith("\n"):
                line.clear(nolock=True)
            self._try("write", text)
            self._try("flush")
            line.above = text or line.above
            line.draw()
        return len(text)

    def flush(self):
        self._try("flush")

    def _try(self, method, *args):
        try:
            getattr(self.stream, method)(*args)
        except (BrokenPipeError, ValueError):
            self.stream = open(os.devnull, "w")


def unbreakable(stream) -> Unbreakable:
    return stream if isinstance(stream, Unbreakable) else Unbreakable(stream)


class Progress:
    """The line of this process. begin() may be called again; words: () -> what it says."""

    def __init__(self):
        self.words = None
        self._began = self._thread = None
        self._over = threading.Event()

    def begin(self, words=None):
        """Show a first line now and go on until end()."""
        self.words = words or self.words
        if self._thread or os.environ.get("RANK", "0") != "0":
            return
        self._began = time.monotonic()
        self._over.clear()
        drawn = isinstance(sys.stdout, Unbreakable) and sys.stdout.isatty()
        if drawn and find_spec("tqdm"):
            Unbreakable.line = make_line(sys.stdout.stream)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def say(self) -> str:
        # not the age of the process: a notebook's kernel may have been there for hours
        loading = f"{clock(time.monotonic() - self._began)}  loading libraries"
        return self.words() if self.words else loading

    def _watch(self):
        line = Unbreakable.line
        every = PLAIN if line is None else REDRAW
        while True:
            text = self.say()
            if line is not None:
                with line.get_lock():
                    line.set_description_str(text, refresh=False)
                    line.draw()
            else:
                sys.stdout.write(text + "\n")  # in one piece: others write too
                sys.stdout.flush()
            if self._over.wait(every):
                return

    def end(self):
        """The terminal belongs to what is printed from here on."""
        if not self._thread:
            return
        self._over.set()
        self._thread.join()
        self._thread = self.words = None
        line, Unbreakable.line = Unbreakable.line, None
        if line is not None:
            line.close()


def make_line(stream):
    """A tqdm bar without a bar: it knows the width of the terminal, and how to clear a line."""
    from tqdm import tqdm

    class Line(tqdm):
        monitor_interval = 0  # no thread of its own
        above = "\n"  # what was written last

        def draw(self):
            if self.above.endswith("\n"):  # else the next word belongs behind the last one
                self.refresh(nolock=True)

    Line.set_lock(threading.RLock())
    return Line(file=stream, bar_format="{desc}", dynamic_ncols=True, leave=False, desc="")


class Pace:
    """Transitions a second within the last PACE seconds."""

    def __init__(self):
        self.points = deque()

    def of(self, step: int) -> float:
        now = time.monotonic()
        if not self.points or step != self.points[-1][1]:
            self.points.append((now, step))
        while len(self.points) > 2 and now - self.points[0][0] > PACE:
            self.points.popleft()
        began, first = self.points[0]
        return (step - first) / max(now - began, 1e-9)


def clock(seconds: float) -> str:
    """4:05 or 1:02:03."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


PROGRESS = Progress()
