"""Train several runs, one after the other, in the same processes: train_each.py RUNS.json [--coordinator …].

Starting four processes takes longer than any of these runs. RUNS.json lists for each its config, its overrides, and the
folder of a run that it goes on from after a step, if it does.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import stopped

from jaxpo import compiler, config_file, processes, run
from jaxpo.evaluation import plots
from jaxpo.run_folder import claim


def train_each(runs: Sequence[dict[str, Any]], where: processes.Place | None) -> None:
    """What `run.train` does of each."""
    compiler.set_up("float32")
    with run.together(where):
        for one in runs:
            config = config_file.load(Path(one["config"]), one["overrides"])
            assert config.output_dir is not None
            if one["after"] is not None and processes.is_first():
                stopped(Path(one["after"]), one["step"], config.output_dir)
            processes.wait(f"{config.output_dir} may be trained")
            with claim(config.output_dir, config):
                run.train_one(config, config.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", type=Path)
    for flag in ("--coordinator", "--processes", "--process"):
        parser.add_argument(flag)
    given = vars(parser.parse_args())
    # They take longer than everything else here.
    plots.write = lambda records, folder: []
    place = processes.place({f"--{name}": given[name] for name in ("coordinator", "processes", "process")}, os.environ)
    train_each(json.loads(given["runs"].read_text()), place)
    sys.exit(0)
