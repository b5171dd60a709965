"""Is a Hugging Face folder what its config.json says? Answered from the headers alone."""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from deepseek_jax.config import ModelConfig
from deepseek_jax.convert.folder import HFFolder
from deepseek_jax.convert.fp8 import blocks
from deepseek_jax.convert.table import SCALE, entries
from deepseek_jax.types import UserError

# Kimi-K2 ships its rotary frequencies, which are computed from the configuration.
_IGNORED = ".rotary_emb.inv_freq"
_WEIGHTS = ("BF16", "F32", "F16")
_SCALES = ("F32", "F8_E8M0", "BF16")


class Problem(NamedTuple):
    """One tensor that is not as expected."""

    tensor: str
    what: str
    """missing, unexpected, shape or dtype."""
    detail: str


@dataclass
class CheckReport:
    """Outcome of ``check_hf``; prints itself with rich."""

    path: Path
    config: ModelConfig
    parameters: int = 0
    """Of the main model: without MTP modules and selection biases."""
    mtp_parameters: int = 0
    """Of the MTP modules, their copies of embedding and head not counted."""
    tensors: int = 0
    bytes: int = 0
    elements_by_dtype: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the folder can be converted."""
        return not self.problems

    def __rich__(self) -> Table:
        """What was found, and the first problems of each kind."""
        table = Table(title=f"{self.path}", show_header=False, title_justify="left")
        table.add_row("parameters", f"{self.parameters:,}")
        if self.mtp_parameters:
            table.add_row("MTP modules", f"{self.mtp_parameters:,}")
        table.add_row("tensors", f"{self.tensors:,} ({self.bytes / 1e9:,.1f} GB)")
        for dtype, count in sorted(self.elements_by_dtype.items()):
            table.add_row(f"  {dtype}", f"{count:,}")
        for what, count in Counter(problem.what for problem in self.problems).items():
            table.add_row(f"[red]{what}[/red]", f"{count:,}")
            for problem in [p for p in self.problems if p.what == what][:5]:
                table.add_row("", f"{problem.tensor} {problem.detail}")
        table.add_row("verdict", "[green]complete[/green]" if self.ok else "[red]not usable[/red]")
        return table


def check_hf(path: str | os.PathLike[str]) -> CheckReport:
    """Compare a folder's headers with what its configuration implies; no data is read.

    Raises:
        UserError: if the folder cannot be opened at all (see ``HFFolder``).
    """
    return check_folder(HFFolder(path))


def check_folder(folder: HFFolder) -> CheckReport:
    """``check_hf`` of an open folder."""
    report = CheckReport(folder.path, folder.config, tensors=len(folder.tensors))
    unexpected = {name for name in folder.tensors if not name.endswith(_IGNORED)}
    for info in folder.tensors.values():
        report.bytes += info.nbytes
        report.elements_by_dtype[info.dtype] += math.prod(info.shape)
    for entry in entries(folder.config):
        unexpected.discard(entry.name)
        if entry.name not in folder.tensors:
            if not entry.row.copy:
                report.problems.append(Problem(entry.name, "missing", ""))
            continue
        if entry.path[0] == "params" and not entry.row.copy:
            size = math.prod(entry.shape)
            if entry.path[1].startswith("mtp_"):
                report.mtp_parameters += size
            else:
                report.parameters += size
        fp8 = entry.row.fp8 and folder.is_fp8(entry.name)
        report.problems += _compare(folder, entry.name, entry.shape, ("F8_E4M3",) * fp8 or _WEIGHTS)
        if fp8:
            unexpected.discard(entry.name + SCALE)
            grid = tuple(blocks(length) for length in entry.shape)
            report.problems += _compare(folder, entry.name + SCALE, grid, _SCALES)
    report.problems += [Problem(name, "unexpected", "") for name in sorted(unexpected)]
    return report


def _compare(
    folder: HFFolder, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> list[Problem]:
    info = folder.tensors.get(name)
    if info is None:
        return [Problem(name, "missing", "")]
    found = []
    if info.shape != shape:
        found.append(Problem(name, "shape", f"{list(info.shape)} instead of {list(shape)}"))
    if info.dtype not in dtypes:
        found.append(Problem(name, "dtype", f"{info.dtype} instead of {' or '.join(dtypes)}"))
    return found


def open_checked(path: str | os.PathLike[str]) -> HFFolder:
    """Open a folder whose tensors are all there, of the right shapes and dtypes.

    Raises:
        UserError: naming the first problem and the number of all.
    """
    folder = HFFolder(path)
    report = check_folder(folder)
    if not report.ok:
        first = report.problems[0]
        what = f"{first.what} {first.detail}".rstrip()
        raise UserError(
            f"{path} does not hold the model of its config.json: {first.tensor} is {what}, one of "
            f"{len(report.problems):,} problems; `deepseek-jax convert --check {path}` lists them."
        )
    return folder
