"""Make what is generated in this project's documents. Run it from anywhere:

    python docs/make.py tables       README.md and docs/methods.md: the tables of methods and papers, from the catalog
    python docs/make.py results      docs/results.md and its pictures, from docs/results/*.json, which `qlab reproduce --json` wrote
    python docs/make.py notebooks    run every notebook and store it with its outputs, without widget state

tests/test_readme.py and tests/test_notebooks.py fail where something here has not been run after a change.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
METHODS = """\
# Methods and papers

Generated from the catalog (`qlab/methods/shelf/`) by `python docs/make.py tables`. `qlab describe NAME` shows a method's options
with types and defaults; the module docstring of its file holds equations, source and deviations.

## Methods

<!-- methods:begin -->
<!-- methods:end -->

## The 20 papers

"runs": a method of the paper can be trained and is covered by the contract tests, or what the paper has instead of one is there.
"planned": not yet.

<!-- papers:begin -->
<!-- papers:end -->
"""


def filled(text: str) -> str:
    """Return a document with the tables between its markers made anew from the catalog.

    Raises:
        ValueError: for a document without the markers.
    """
    from qlab.methods.catalog import methods_table, papers_table

    for name, table in (("methods", methods_table()), ("papers", papers_table())):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the document must have one pair of markers {begin.strip()} and {end}")
        head, rest = text.split(begin)
        text = head + begin + table + "\n" + end + rest.split(end)[1]
    return text


def documents() -> dict[Path, str]:
    """Return every document with tables, as it should be."""
    readme = ROOT / "README.md"
    return {readme: filled(readme.read_text(encoding="utf-8")), ROOT / "docs" / "methods.md": filled(METHODS)}


def tables() -> None:
    """Write the tables."""
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
        print(path)


RESULTS = """\
# Results

What `qlab reproduce` found on real runs, one section for each file of `docs/results/`; made by `python docs/make.py results`.
Each section gives the command, the device, the claim, the rule that judged it, and mean ± standard deviation over seeds. A claim
that fails, or stays undecided, stands here as well.
"""


def results() -> None:
    """Write docs/results.md and a picture for each result."""
    from qlab.experiments import EXPERIMENTS

    sections = [RESULTS]
    for path in sorted((ROOT / "docs" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        result = EXPERIMENTS.load(record["experiment"]).read(path)
        figure = result.figure()
        figure.savefig(path.with_suffix(".png"), dpi=80)
        failed = "".join(
            f"\n- not finished: {f['arm']}, seed {f['seed']}: {f['error']}" for f in record["evidence"]["failures"]
        )
        sections.append(
            f"""\
## {result.experiment} on {result.data}: {result.verdict}

```sh
{record["command"]}
```

{result.summary()}

- rule: {result.rule}
- {result.seconds / 60:.0f} minutes of computing time in all; torch {result.versions["torch"]}{failed}

{_markdown(result.table())}

![{figure.get_label()}](results/{path.stem}.png)
"""
        )
    target = ROOT / "docs" / "results.md"
    target.write_text("\n".join(sections), encoding="utf-8")
    print(target)


def _markdown(table: pd.DataFrame) -> str:
    lines = [[str(table.index.name), *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[str(arm), *map(str, row)] for arm, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def notebooks() -> None:
    """Run every notebook in a fresh kernel and store it as it is committed: executed, pictures static, no widget state."""
    import nbformat
    from nbclient import NotebookClient

    # The kernels inherit it: sums then come out the same on any number of cores, and small nets are no slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            store_widget_state=False,  # megabytes that a reader without this kernel cannot use
            record_timing=False,
        )
        begun = time.perf_counter()
        client.execute()
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        for cell in notebook.cells:
            cell["metadata"].pop("execution", None)  # times of another tool's run
        for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
            # Without state the live view is an empty box, and Jupyter would show it in preference to the picture.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        nbformat.write(notebook, path)
        print(f"{path}  {path.stat().st_size / 1024:.0f} KB, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    makers = {maker.__name__: maker for maker in (tables, results, notebooks)}
    wanted = sys.argv[1:]
    if not wanted or any(name not in makers for name in wanted):
        sys.exit(__doc__)
    for name in wanted:
        makers[name]()
