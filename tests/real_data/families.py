"""Each family of objectives on real data, a few minutes each: does the held-out metric it is there for improve?

    python tests/real_data/families.py OUT [--only kto,reward] [--json OUT.json]

Trains stories260k (and SmolLM2-135M where the answers are long or Chinese) from ../shared on rows of HH-RLHF, kto_en,
dpo_zh, alpaca_en and GSM8K's judged solutions, and prints the metric before and after on rows that were held out.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"
SMOLLM2 = Path("~/.cache/jaxpo-models/smollm2-135m-instruct").expanduser()
Row = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A run: its objective, its rows, the held-out metric that it should improve and in which direction."""

    objective: Row
    rows: str
    metric: str
    rises: bool = True
    model: Path = STORIES
    learning_rate: float = 5e-5
    sections: dict[str, Row] = field(default_factory=dict)


SMALL = {
    "data": {"max_length": 256, "max_prompt_length": 128},
    "training": {"batch_size": 16, "row_length": 640, "max_steps": 50},
}
FAMILIES = {
    "sft": Family({"name": "sft"}, "alpaca_en", "eval_loss", rises=False, learning_rate=1e-3),
    "dpo": Family({"name": "dpo"}, "hh", "eval_rewards/accuracies"),
    "ipo": Family({"name": "ipo"}, "hh", "eval_rewards/accuracies"),
    "tr-dpo": Family(
        {"name": "dpo"},
        "hh",
        "eval_rewards/accuracies",
        sections={"reference": {"sync_steps": 16, "mixup_alpha": 0.6}},
    ),
    "simpo": Family({"name": "simpo"}, "hh", "eval_loss", rises=False),
    # The odds ratio's own term: -log sigmoid of it is what ORPO adds to the likelihood.
    "orpo": Family({"name": "orpo", "beta": 1.0}, "hh", "eval_log_odds_ratio"),
    "kto": Family({"name": "kto"}, "hh", "eval_rewards/margins"),
    "bco": Family({"name": "bco"}, "hh", "eval_rewards/margins"),
    "apo_zero_unpaired": Family({"name": "apo_zero_unpaired"}, "hh", "eval_rewards/accuracies"),
    "plackett_luce": Family(
        {"name": "plackett_luce", "max_completions": 3}, "gsm8k_rankings", "eval_rewards/accuracies"
    ),
    "all_pairs": Family(
        {"name": "all_pairs", "max_completions": 3, "pair": {"name": "dpo"}},
        "gsm8k_rankings",
        "eval_rewards/accuracies",
    ),
    "mixture": Family(
        {
            "name": "mixture",
            "terms": [
                {"weight": 0.8, "objective": {"name": "dpo"}},
                {"weight": 0.2, "objective": {"name": "bco_pair"}},
                {"weight": 1.0, "objective": {"name": "sft"}},
            ],
        },
        "hh",
        "eval_rewards/accuracies",
    ),
    "reward": Family({"name": "reward"}, "hh", "eval_accuracy"),
    "kto-gsm8k": Family(
        # 37 % of the solutions are right: the weight that brings both kinds into balance.
        {"name": "kto", "desirable_weight": 2.0},
        "gsm8k_labels",
        "eval_rewards/margins",
        model=SMOLLM2,
        learning_rate=1e-5,
        sections={"training": {"batch_size": 16, "max_steps": 15}},
    ),
    "kto-smollm2": Family(
        {"name": "kto"},
        "kto_en",
        "eval_rewards/margins",
        model=SMOLLM2,
        learning_rate=1e-5,
        sections={"training": {"batch_size": 8, "max_steps": 12}},
    ),
    "dpo-smollm2": Family(
        {"name": "dpo"},
        "dpo_zh",
        "eval_rewards/accuracies",
        model=SMOLLM2,
        learning_rate=1e-5,
        sections={"training": {"batch_size": 8, "max_steps": 12}},
    ),
}


def hh() -> list[list[Row]]:
    with gzip.open(SHARED / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [[json.loads(line)] for line in lines]


def demo(name: str) -> Callable[[], list[list[Row]]]:
    file = SHARED / "data" / "llamafactory-demo" / f"{name}_demo.json"
    return lambda: [[row] for row in json.loads(file.read_text(encoding="utf-8"))]


def solutions() -> list[Row]:
    text = (SHARED / "data" / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def judged(row: Row) -> list[tuple[str, bool]]:
    tried = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
    return [(one["solution"], bool(one["is_correct"])) for one in tried if one["solution"].strip()]


def gsm8k_labels() -> list[list[Row]]:
    """Every solution of a question and whether it is right; a question's are held out together."""
    return [
        [{"prompt": row["question"] + "\n", "completion": text, "label": right} for text, right in judged(row)]
        for row in solutions()
    ]


def gsm8k_rankings() -> list[list[Row]]:
    """The true solution, a right one and a wrong one, where a question has both."""
    rows = []
    for row in solutions():
        right = next((text for text, ok in judged(row) if ok), None)
        wrong = next((text for text, ok in judged(row) if not ok), None)
        if right and wrong:
            rows.append([{"prompt": row["question"] + "\n", "completions": [row["ground_truth"], right, wrong]}])
    return rows


# Rows in groups that are held out together, and how many groups to train on and to hold out.
ROWS = {
    "hh": (hh, 1600, 256),
    "alpaca_en": (demo("alpaca_en"), 800, 100),
    "kto_en": (demo("kto_en"), 240, 40),
    "dpo_zh": (demo("dpo_zh"), 240, 32),
    "gsm8k_labels": (gsm8k_labels, 60, 12),
    "gsm8k_rankings": (gsm8k_rankings, 560, 120),
}


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(family: Family, out: Path) -> Row:
    make, train, held_out = ROWS[family.rows]
    groups = make()
    random.Random(0).shuffle(groups)
    files = {
        "train": write_rows(out / f"{family.rows}-train.jsonl", chain(*groups[:train])),
        "eval": write_rows(out / f"{family.rows}-eval.jsonl", chain(*groups[-held_out:])),
    }
    more = {key: SMALL.get(key, {}) | family.sections.get(key, {}) for key in SMALL.keys() | family.sections.keys()}
    template = {"chat_template": "chatml"} if family.model == STORIES and family.rows != "gsm8k_labels" else {}
    more["data"] |= {split: [{"path": path}] for split, path in files.items()} | template
    return {
        "model": {"path": str(family.model), "compute_dtype": "float32", "remat": "none"},
        "objective": family.objective,
        "optimizer": {"learning_rate": family.learning_rate, "warmup_ratio": 0.1},
        "samples": {"prompts": 0},
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(FAMILIES)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        family, folder = FAMILIES[name], arguments.out / name
        path = arguments.out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config(family, arguments.out)), encoding="utf-8")
        command = [sys.executable, "-m", "jaxpo.launch", "train", str(path), f"output_dir={folder}"]
        with (arguments.out / f"{name}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        before, after = summary["before"][family.metric], summary["after"][family.metric]
        better = (after > before) == family.rises
        found[name] = {"rows": family.rows, "metric": family.metric, "before": before, "after": after, "better": better}
        found[name] |= {"steps": summary["steps"], "seconds": summary["seconds"]["train"], "summary": summary["after"]}
        print(
            f"{name:20} {family.rows:15} {family.metric:26} {before:9.4f} -> {after:9.4f}",
            "" if better else "NOT BETTER",
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if not all(one["better"] for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
