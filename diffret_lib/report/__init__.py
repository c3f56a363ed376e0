"""Tables, figures and the record of a run, and the call that every notebook starts with."""

from __future__ import annotations

import atexit
import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from IPython.display import Markdown, display

from diffret_lib.cache import cache_dir, sweep
from diffret_lib.config import Profile, load_profile
from diffret_lib.report.results import Results, set_style


def start(
    profile: str | Path | Mapping[str, Any] | Profile,
    collection: str | Path | None = None,
    results_root: str | Path | None = None,
) -> tuple[Any, Results]:
    """Start a notebook: return its :class:`~diffret_lib.experiments.study.Study` and the folder of its results.

    Parameters and errors are those of :func:`~diffret_lib.config.load_profile` and :class:`Results`.  The peak memory
    of the process (bytes) is written to the file that ``DIFFRET_PEAK_FILE`` names.
    """
    from diffret_lib.experiments.study import Study  # results alone do without torch

    profile = load_profile(profile, collection)
    results, study = Results(profile, results_root), Study(profile)
    for folder in (results.folder, cache_dir()):
        sweep(folder)
    set_style()
    results.record_environment(profile)
    display(Markdown(f"Profile **{profile.name}**: {profile.description}."))
    # what the imports made lives as long as the process: collecting it again and again, and at the end, costs seconds
    gc.freeze()
    atexit.register(gc.freeze)
    if path := os.environ.get("DIFFRET_PEAK_FILE"):
        atexit.register(_write_peak, Path(path))
    return study, results


def answer(text: str = "") -> None:
    """Show a notebook's answer: where it was called without a text, however much later the text is known."""
    shown = Markdown(f"**Answer.** {text or 'The cells below compute it.'}")
    display(shown, display_id="answer", update=bool(text))


def _write_peak(path: Path) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, on macOS bytes
    path.write_text(str(peak if sys.platform == "darwin" else peak * 1024), encoding="utf-8")
