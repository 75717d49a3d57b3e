"""``l3env sweep``: a grid of runs as a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.shared import (
    SHOWN_FAILURES,
    Fresh,
    Jobs,
    Json,
    announce_compilation,
    end,
    err,
    finite,
    folder_out,
    print_json,
    progress_bar,
    say,
    say_taken,
)
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError


def sweep(
    study: Annotated[Path, typer.Argument(help="The study: a YAML file, or the config.json of an earlier one.")],
    out: Annotated[
        Path | None, typer.Option(callback=folder_out, help="Folder; resumes what is there. By default runs/NAME.")
    ] = None,
    backend: Annotated[str, typer.Option(help="loky (local processes) or ray.")] = "loky",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; without it Ray starts here.")] = None,
    jobs: Jobs = -1,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Runs policies x systems x models x traces x loads x seeds; resumes; failed cells do not stop the others."""
    from l3env.files import write_text
    from l3env.report.html import write_html
    from l3env.runs.compare import read_comparison, run_grid
    from l3env.runs.grid import Grid
    from l3env.runs.store import read_config

    is_json = study.suffix == ".json"
    grid = Grid.from_json(read_config(study)) if is_json else Grid.from_yaml(study)
    folder = out or (study.parent if is_json else Path("runs") / study.stem)
    announce_compilation(compile_now=True, prefix_cache=grid.prefix_cache)
    workers = start_backend(backend, address, jobs)
    with progress_bar("sweeping") as progress:
        found = run_grid(grid, out=folder, fresh=fresh, workers=workers, progress=progress)
    say_taken(found.taken_count, len(found.results), folder)
    if as_json:
        print_json({"config": grid.to_json(), "results": plain_rows(found.results)})
    else:
        stdout.print(f"{len(found.done):,} runs done, {len(found.failed):,} failed")
    for row in found.failed.head(SHOWN_FAILURES).to_dict("records"):
        say(f" {row['error']}", f"{row['key']}:", "red")
    with err.status("drawing ..."):
        shown = read_comparison(folder)
        write_text(folder / "results.csv", shown.results.to_csv(index=False))
        write_html(shown, f"Study {folder.name}", folder / "report.html")
    say(f"written: {folder}/results.csv, report.html, config.json and the datasets")
    end(found.failed)


def report(folder: Annotated[Path, typer.Argument(help="Folder of a comparison or study.")]) -> None:
    """Draws the page of a folder again, finished or not."""
    from l3env.report.html import write_html
    from l3env.runs.compare import read_comparison

    if not (folder / "config.json").is_file():
        raise L3EnvError(f"{folder}: {_no_page(folder)}; expected the folder of compare, demo or sweep")
    path = write_html(read_comparison(folder), f"Study {folder.name}", folder / "report.html")
    say(f"written: {path}")


def _no_page(folder: Path) -> str:
    """Why a folder gives no page, and where to look instead."""
    if not folder.is_dir():
        return "is a file" if folder.exists() else "no such folder"
    if (folder / "config.yml").is_file():
        return f"a training run: see learning_curve.png and evaluations.csv in it, or l3env evaluate {folder}"
    if (folder / "policy.png").is_file():
        return (
            "results of l3env evaluate: see results.csv and policy.png in it, or give that command again for its table"
        )
    if any(folder.glob("cells/search.*.json")):
        return "kept searches of l3env capacity: give that command again for its table"
    return "no results here (no config.json)"


def start_backend(backend: str, address: str | None, jobs: int) -> Any:
    """Workers of a joblib backend, made ready. Raises L3EnvError for an unknown one, and Ray where it is not there."""
    if backend not in ("loky", "threading", "sequential", "ray"):
        raise L3EnvError(f"--backend {backend!r}; expected loky, threading, sequential or ray")
    if address is not None and backend != "ray":
        raise L3EnvError("--address is for --backend ray")
    from l3env.runs.workers import Workers

    if backend == "ray":
        try:
            from l3env.runs import ray_backend
        except ModuleNotFoundError as error:
            raise L3EnvError(f"--backend ray needs Ray ({error}): pip install 'l3env[sweep]'") from None
        ray_backend.connect(address, jobs)
    return Workers(backend, jobs)


def plain_rows(frame: Any) -> list[dict[str, Any]]:
    """Rows for JSON: None for what JSON has no number for."""
    return [{key: finite(value) for key, value in row.items()} for row in frame.to_dict("records")]
