"""Where numbers go: CSV files always, TensorBoard and Weights & Biases if asked for.

All of them continue after an interruption without a lost or a doubled step. The CSV files are cut back to the step of
the checkpoint, and TensorBoard purges what came after it. W&B can neither take back what it was sent nor say what of it
was lost when its process was killed too: it is not sent the same steps again, and what it may have lost is sent from
the CSV files.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blipdiff_train.common.files import atomic_path, write_json, write_text

if TYPE_CHECKING:
    from PIL import Image


class MetricsLogger(Protocol):
    """What the training callbacks need of a logger; they call it on rank 0 only."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_image(self, name: str, image: Image.Image, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


DELIVERED = "delivered.json"


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
        validated: the last validation that had been written before this start, 0 without any.
    """

    def __init__(self, folder: str | Path, *, step: int, validation_due: bool = False) -> None:
        self.folder = Path(folder)
        self._training = CsvFile(self.folder / "metrics.csv")
        self._validation = CsvFile(self.folder / "validation.csv")
        self._training.continue_after(step)
        self.validated = self._validation.continue_after(step - validation_due)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        (self._validation if _is_validation(metrics) else self._training).write(metrics, step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        with atomic_path(self.folder / "samples" / f"{name}-{step:08d}.png") as temporary:
            image.save(temporary)

    def written(self) -> list[tuple[int, dict[str, float]]]:
        """Everything in the tables as (step, metrics), in the order in which it was logged."""
        rows = [row for table in (self._training, self._validation) for row in table.rows()]
        found = [(int(row["step"]), {n: float(v) for n, v in row.items() if n != "step" and v}) for row in rows]
        return sorted(found, key=lambda item: item[0])  # stable: a step's validation follows it

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

    Each start is a session of W&B's in ``folder/wandb``. One that was closed has delivered everything and says so in
    ``delivered.json``. Of one that was killed, W&B has what its server tells when the run goes on; offline there is no
    server, and the session's file is incomplete: it is put aside as a whole.

    Args:
        folder: of the run.
        run_id: of the run that is continued; None for the one of the folder, or a new one.
        written: what the CSV files hold: sent again as far as W&B may not have it.
        config: the resolved configuration as plain data.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        run_id: str | None,
        written: Sequence[tuple[int, Mapping[str, float]]],
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
        self._wandb = wandb
        # the file knows the id before the first checkpoint does
        file = Path(folder) / "wandb_run_id"
        known = file.read_text(encoding="utf-8").strip() if file.exists() else ""
        self.run_id = run_id or known or secrets.token_hex(4)
        write_text(file, self.run_id + "\n")
        self._sent = {"training": 0, "validation": 0}
        for session in sorted((Path(folder) / "wandb").glob(f"*run-*-{self.run_id}")):
            self._take_in(session)
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
        summary = self._run.summary  # empty unless a server knows the run
        for kind, key in (("training", "step"), ("validation", "validation_step")):
            self._sent[kind] = max(self._sent[kind], int(summary.get(key) or 0))
        self._logged = dict(self._sent)
        for step, metrics in written:
            self.log(metrics, step)
        last = max((step for step, _ in written), default=0)
        for path in sorted((Path(folder) / "samples").glob("*-[0-9]*.png")):
            picture, number = path.stem.rsplit("-", 1)
            if int(number) <= last:
                self.log_image(picture, path, int(number))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        kind = "validation" if _is_validation(metrics) else "training"
        if step > self._sent[kind]:
            extra = {"validation_step": step} if kind == "validation" else {}
            self._run.log({**metrics, **extra, "step": step})
            self._logged[kind] = step

    def log_image(self, name: str, image: Image.Image | Path, step: int) -> None:
        if step > self._sent["training"]:
            image = str(image) if isinstance(image, Path) else image
            self._run.log({f"samples/{name}": self._wandb.Image(image), "step": step})

    def flush(self) -> None:
        """Nothing: W&B has no such call, and what it loses is sent again."""

    def close(self) -> None:
        self._run.finish()
        write_json(Path(self._run.sync_dir) / DELIVERED, self._logged)

    def _take_in(self, session: Path) -> None:
        """Learn what an earlier session has delivered."""
        if (session / DELIVERED).exists():
            delivered = json.loads((session / DELIVERED).read_text(encoding="utf-8"))
            self._sent = {kind: max(step, delivered[kind]) for kind, step in self._sent.items()}
        elif session.name.startswith("offline-"):
            session.rename(session.with_name(f"killed-{session.name}"))  # a name that `wandb sync` passes over
