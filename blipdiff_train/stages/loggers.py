"""Where numbers go: CSV files always, TensorBoard and Weights & Biases if asked for.

All of them continue after an interruption without a lost or a doubled step: the CSV files are cut back to the step of
the checkpoint, TensorBoard purges what came after it, and W&B, which cannot take back what it was sent, is not sent the
same steps again.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blipdiff_train.common.files import atomic_path, write_text

if TYPE_CHECKING:
    from PIL import Image


class MetricsLogger(Protocol):
    """What the training callbacks need of a logger; they call it on rank 0 only."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, image: Image.Image, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _is_validation(metrics: Mapping[str, float]) -> bool:
    return all(name.startswith("val/") for name in metrics)


class CsvFile:
    """One table whose first column is the step; new columns may appear at any time.

    Args:
        path: of the file; made with the first row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._file: io.TextIOWrapper | None = None

    def rows(self) -> list[dict[str, str]]:
        """All whole rows; a last line cut off by a crash is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return [row for row in csv.DictReader(whole) if row["step"].isdigit()]

    def continue_after(self, step: int) -> int:
        """Drop rows of later steps; returns the last step that had been written, 0 without any."""
        rows = self.rows()
        if not rows:
            self.path.unlink(missing_ok=True)
            return 0
        self._rewrite([row for row in rows if int(row["step"]) <= step], list(rows[0]))
        return int(rows[-1]["step"])

    def write(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a row and hand it to the operating system: killing the process loses nothing."""
        if self._file is None:
            rows = self.rows()
            self._columns = list(rows[0]) if rows else []
        new = [name for name in metrics if name not in self._columns]
        if new or not self._columns:
            self._rewrite(self.rows(), [*(self._columns or ["step"]), *new])
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8", newline="")
        row = {"step": str(step)} | {name: repr(float(value)) for name, value in metrics.items()}
        csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
        self._file.flush()

    def flush(self) -> None:
        """Bring the rows to the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self.close()
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self._columns = columns


class CsvLogger:
    """``metrics.csv`` (training) and ``validation.csv`` in a run's folder; pictures as files in ``samples/``.

    Args:
        folder: of the run.
        step: that the run continues after, 0 for a new run.
        validation_due: the validation of that step will be made (again).

    Attributes:
        written: the last training step that had been written before this start, 0 without any.
        validated: the same of the validations.
    """

    def __init__(self, folder: str | Path, *, step: int, validation_due: bool = False) -> None:
        self.folder = Path(folder)
        self._training = CsvFile(self.folder / "metrics.csv")
        self._validation = CsvFile(self.folder / "validation.csv")
        self.written = self._training.continue_after(step)
        self.validated = self._validation.continue_after(step - validation_due)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        (self._validation if _is_validation(metrics) else self._training).write(metrics, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        with atomic_path(self.folder / "samples" / f"{name}-{step:08d}.png") as temporary:
            image.save(temporary)

    def flush(self) -> None:
        self._training.flush()
        self._validation.flush()

    def close(self) -> None:
        self._training.close()
        self._validation.close()


class TensorBoardLogger:
    """TensorBoard events in ``folder/tensorboard``.

    Args:
        folder: of the run.
        step: that the run continues after: events of later steps are purged.
        validated: the last validation that had been written: it is not written again.
    """

    def __init__(self, folder: str | Path, *, step: int, validated: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logger.tensorboard needs the package: pip install tensorboard") from error
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
        self._validated = min(step, validated)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        is_validation = _is_validation(metrics)
        if is_validation and step <= self._validated:
            return
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if is_validation:
            self._writer.flush()

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run that keeps its id for the life of the run's folder.

    Args:
        folder: of the run.
        run_id: of the run that is continued; None for the one of the folder, or a new one.
        sent: the last training step, and the last validation, that the run was sent before: they are not sent again.
        config: the resolved configuration as plain data.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        run_id: str | None,
        sent: tuple[int, int],
        project: str,
        entity: str | None,
        mode: str,
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logger=wandb needs the package: pip install wandb") from error
        self._wandb, self._sent = wandb, sent
        # the file knows the id before the first checkpoint does
        file = Path(folder) / "wandb_run_id"
        known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        self.run_id = run_id or known or secrets.token_hex(4)
        write_text(file, self.run_id + "\n")
        self._run = wandb.init(
            id=self.run_id,
            resume="allow",
            dir=str(folder),
            project=project,
            entity=entity,
            mode=mode,
            name=name,
            config=dict(config),
        )
        # every curve over our step, whatever W&B counts itself
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step > self._sent[_is_validation(metrics)]:
            self._run.log({**metrics, "step": step})

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        if step > self._sent[0]:
            self._run.log({f"samples/{name}": self._wandb.Image(image), "step": step})

    def flush(self) -> None:
        """W&B's own process has been handed every row already."""

    def close(self) -> None:
        self._run.finish()
