# SPDX-License-Identifier: Apache-2.0
"""Everything people see of a run: the live view, the files, TensorBoard, the summary, the plots.

Each is a listener of the event stream or a function of a recorded one; none knows who emits it. rich, TensorBoard and
matplotlib are imported when they are first used.
"""

from distbelief.report.files import EventFile, read_events, read_summary, write_summary
from distbelief.report.plots import write_plots
from distbelief.report.summary import Summary, summarize, text
from distbelief.report.tensorboard import TensorBoardFiles, tensorboard_files
from distbelief.report.terminal import Terminal

__all__ = [
    "EventFile",
    "Summary",
    "TensorBoardFiles",
    "Terminal",
    "read_events",
    "read_summary",
    "summarize",
    "tensorboard_files",
    "text",
    "write_plots",
    "write_summary",
]
