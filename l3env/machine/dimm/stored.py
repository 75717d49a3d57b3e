"""The fitted linear models as stored with the presets: ``presets/pim_fit/NAME.toml``, one ``[[kind]]`` an attention."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import asdict, dataclass

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
        pim: name of the preset.
        rank_bytes_per_s: what the rank streams with rows open; times scale with it.
        macs_per_element_count: N_cmr of the fit.
    """

    pim: str
    rank_bytes_per_s: float
    macs_per_element_count: int
    kinds: tuple[Kind, ...]

    def find(self, queries_per_kv_head: int) -> Kind | None:
        return next((kind for kind in self.kinds if kind.queries_per_kv_head == queries_per_kv_head), None)


@functools.cache
def load_fit(pim: str) -> RankFit | None:
    """The stored fit of a PIM preset, None where there is none."""
    path = FIT_DIR / f"{pim}.toml"
    if not path.is_file():
        return None
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    kinds = tuple(Kind(**kind) for kind in raw["kind"])
    return RankFit(raw["pim"], raw["rank_bytes_per_s"], raw["macs_per_element_count"], kinds)


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
