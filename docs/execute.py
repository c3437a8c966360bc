"""Execute walkthrough.ipynb from top to bottom and store its outputs; with --check only execute it.

    python docs/execute.py [--check]

(`jupyter execute` would also store the times of execution, and one output per flush of a stream.)
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "walkthrough.ipynb"


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=folder).execute()
    if "--check" not in sys.argv[1:]:
        notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run it
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
