"""The EMA callback: an average that forgets as its decay says; ``weight_average.py`` has what it does in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_plugins.core.durations import check_duration
from lightning_plugins.ema.decay import DecayRule, UpdateCounter, interval
from lightning_plugins.ema.function_decay import as_decay_rule
from lightning_plugins.ema.weight_average import WeightAverage


class EMA(WeightAverage):
    """Keeps an exponential moving average of the weights and evaluates, saves and ends with it.

    shadow <- shadow - (1 - decay) * (shadow - weight), after every applied optimizer step, in float32 at least. A step
    that a gradient scaler skipped, a batch that returned ``None`` and a batch inside an accumulation window change no
    weight and no average.

    When:
        ``on_train_batch_end`` updates; ``on_validation_start``/``_end`` and their siblings swap; ``on_train_end``
        leaves the module with what ``after_fit`` says.

    Checkpoint:
        ``state_dict`` is the average, so ``load_from_checkpoint`` needs nothing of this. The raw weights lie under
        ``lightning_plugins_ema`` in full files, in a folder of that name in directories;
        :func:`~lightning_plugins.extract_weights` gives either. Weights that the strategy loads in mid-fit restore
        both sets. A file saved after other weights were written into the module holds those alone.

    Distributed:
        Under DDP every rank keeps the same average, without communication; under FSDP1 (``use_orig_params=True``) and
        FSDP2 its own share, and the whole is gathered only for a checkpoint that is a single file. Under DeepSpeed's
        ZeRO a rank averages its part of the float32 masters, and writes it into a file of its own beside DeepSpeed's,
        which hold the trained weights.

    Cost:
        4 bytes per trainable parameter; an update takes as long as reading and writing the average once. A module in
        half precision keeps its raw weights, 2 bytes per parameter, while the average is swapped in. After a fit that
        leaves the average in the module the raw weights are kept on the host.

    Does not compose with:
        Lightning's StochasticWeightAveraging and WeightAveraging, which are refused at setup; parts
        taken out of the module in mid-run, which end the fit with an error.

    Args:
        decay: Share of the old average that an update keeps. A number d means
            :class:`~lightning_plugins.WarmupDecay`: min(d, (1 + n) / (10 + n)) at the n-th step, so that the untrained
            weights are forgotten at once. A :class:`~lightning_plugins.DecayRule`, or any function of n, the first step
            being 1, or its import path. A :class:`~lightning_plugins.Schedule` is taken at n - 1, as it counts steps
            from 0, and counts its lengths in the run's: ``Cosine(None, 0.996, 1.0)`` is BYOL's and DINO's momentum.
        update_every_n_steps: Applied steps between two updates, each with the decay of that many steps; at least 1. Or
            a share of the run (``0.01``, ``"1%"``) or epochs (``"1ep"``).
        start_step: Applied steps after which the average begins, as a copy of the weights; before, everything is raw.
            Or a share of the run, as ``"95%"``, or epochs.
        device: Where the average lies; ``None`` for beside the weights. ``"cpu"`` spares GPU memory: the average is
            pinned and every update streams it over the bus twice, so pair it with a large ``update_every_n_steps``.
        buffers: ``"copy"`` evaluates the average with the module's own buffers (batch statistics), ``"average"``
            averages the floating-point ones too. Integers are never averaged.
        evaluate: The weights that validation, test and predict use, from the first update on.
        checkpoint: What every file that is written during fit has as its ``state_dict``, from the first update on.
        after_fit: What the module holds when fit has ended; the other is in :meth:`raw_state_dict` or
            :meth:`average_state_dict`. After an exception the module holds its raw weights.
        name: Distinguishes several EMAs of one Trainer, of which at most one evaluates and one owns the ``state_dict``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of its range or a word not one of those listed; in a run, if a decay of your own
            is outside [0, 1].
        MisconfigurationException: When the fit starts, if something depends on the length of a run that is not known.

    References:
        B. Polyak and A. Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is
        TensorFlow's. Differs from Lightning's ``EMAWeightAveraging``: see the card in ``ema/README.md``.
    """

    technique = "EMA"

    def __init__(
        self,
        decay: float | DecayRule | Callable[[int], float] = 0.9999,
        *,
        update_every_n_steps: int | float | str = 1,
        start_step: int | float | str = 0,
        device: str | None = None,
        buffers: Literal["copy", "average"] = "copy",
        evaluate: Literal["average", "raw"] = "average",
        checkpoint: Literal["average", "raw"] = "average",
        after_fit: Literal["average", "raw"] = "average",
        name: str = "ema",
    ) -> None:
        self.update_every_n_steps = interval("update_every_n_steps", update_every_n_steps)
        self.start_step = check_duration("start_step", start_step)
        self.decay = as_decay_rule(decay)
        super().__init__(
            self.decay,
            UpdateCounter(self.start_step, self.update_every_n_steps),
            device=device,
            buffers=buffers,
            evaluate=evaluate,
            checkpoint=checkpoint,
            after_fit=after_fit,
            name=name,
        )
