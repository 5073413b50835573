"""Running statistics and where they go: CSV files, TensorBoard, the progress bar, a classification report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_plugins.core.imports import lazy_exports

if TYPE_CHECKING:
    from lightning_plugins.statistics.csv_logger import CSVStatisticsLogger
    from lightning_plugins.statistics.plot import plot_log
    from lightning_plugins.statistics.recorder import StatisticsRecorder
    from lightning_plugins.statistics.report import ClassificationReport
    from lightning_plugins.statistics.tensorboard_logger import TensorBoardStatisticsLogger

__all__ = [
    "CSVStatisticsLogger",
    "ClassificationReport",
    "StatisticsRecorder",
    "TensorBoardStatisticsLogger",
    "plot_log",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CSVStatisticsLogger": f"{__name__}.csv_logger",
        "ClassificationReport": f"{__name__}.report",
        "StatisticsRecorder": f"{__name__}.recorder",
        "TensorBoardStatisticsLogger": f"{__name__}.tensorboard_logger",
        "plot_log": f"{__name__}.plot",
    },
)
