"""The fitted linear models of a rank: ``presets/pim_fit/NAME.toml`` or a file like it, a ``[[kind]]`` an attention."""

from __future__ import annotations

import difflib
import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from l3env.errors import SpecError
from l3env.files import read_toml
from l3env.machine.specs import PRESET_DIR

FIT_DIR = PRESET_DIR / "pim_fit"


@dataclass(frozen=True)
class Kind:
    """One kind of attention in one rank: t = token_s * tokens + job_s * jobs + batch_s, per layer.

    A job is ``heads_per_job_count`` KV heads of one request; errors are relative to the simulator.
    """

    name: str
    queries_per_kv_head: int
    passes_count: int
    chips_per_head_count: int
    token_split_count: int
    heads_per_job_count: int
    token_s: float
    job_s: float
    batch_s: float
    points_count: int
    error_median_frac: float
    error_p99_frac: float
    error_worst_frac: float
    unseen_error_median_frac: float
    unseen_error_worst_frac: float


@dataclass(frozen=True)
class RankFit:
    """All kinds fitted for one PIM preset.

    Attributes:
        pim: name of the preset that was simulated.
        rank_bytes_per_s: what its rank streams with rows open.
        macs_per_element_count: N_cmr of the fit.
    """

    pim: str
    rank_bytes_per_s: float
    macs_per_element_count: int
    kinds: tuple[Kind, ...]

    def find(self, queries_per_kv_head: int) -> Kind | None:
        return next((kind for kind in self.kinds if kind.queries_per_kv_head == queries_per_kv_head), None)


@functools.cache
def load_fit(ref: str) -> RankFit:
    """The fit that a PIM spec names: ``pim_fit/NAME``, or a TOML file. Raises SpecError for what is wrong with it."""
    name = ref.removeprefix("pim_fit/")
    path = Path(ref) if ref.endswith(".toml") else FIT_DIR / f"{name}.toml"
    if not path.is_file():
        names = sorted(each.stem for each in FIT_DIR.glob("*.toml"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean 'pim_fit/{close[0]}'?)" if close else ""
        raise SpecError(
            f"unknown fit {ref!r}{hint}; there are: {', '.join(names)}; or a file of experiments/fit_pim.py"
        )
    try:
        raw = read_toml(path, SpecError)
        kinds = tuple(Kind(**kind) for kind in raw["kind"])
        return RankFit(raw["pim"], raw["rank_bytes_per_s"], raw["macs_per_element_count"], kinds)
    except (KeyError, TypeError) as error:
        raise SpecError(f"{path}: not a fit as experiments/fit_pim.py writes it: {error!r}") from None


def to_toml(fit: RankFit, header: str) -> str:
    """The file that ``load_fit`` reads."""
    lines = [f"# {header}", f'pim = "{fit.pim}"', f"rank_bytes_per_s = {fit.rank_bytes_per_s:.9e}"]
    lines += [f"macs_per_element_count = {fit.macs_per_element_count}"]
    for kind in fit.kinds:
        lines += ["", "[[kind]]"]
        for key, value in asdict(kind).items():
            if isinstance(value, str):
                lines.append(f'{key} = "{value}"')
            elif isinstance(value, float):
                lines.append(f"{key} = {value:.6e}")
            else:
                lines.append(f"{key} = {value}")
    return "\n".join(lines) + "\n"
