"""Running statistics and where they go: CSV files, TensorBoard, the progress bar, a classification report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.statistics.csv_logger import CSVStatisticsLogger as CSVStatisticsLogger
    from lightning_plugins.statistics.plot import plot_log as plot_log
    from lightning_plugins.statistics.recorder import StatisticsRecorder as StatisticsRecorder
    from lightning_plugins.statistics.report import ClassificationReport as ClassificationReport
    from lightning_plugins.statistics.tensorboard_logger import (
        TensorBoardStatisticsLogger as TensorBoardStatisticsLogger,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
